"""A region of an adapter as one flat vector on a device, with the network's tensors as views.

So optimising, clipping, loading and reading are each a few operations on one vector,
whatever the number of modules. Knows nothing of base models or of training.
"""

from collections.abc import Mapping

import torch

from fedpeft.adapters import AdapterSchema, AdapterState, Factors, TensorSpec


class Region:
    """Some factors of the adapter ``whole``: their rows of A and columns of B in ``columns``.

    ``vector`` is float32, (schema.numel,), in the order of ``schema``.
    """

    def __init__(
        self, whole: AdapterSchema, factors: Factors, columns: range, device: torch.device
    ) -> None:
        self.schema = whole.part(factors).of_rank(len(columns))
        self.vector = torch.zeros(self.schema.numel, device=device)
        self._columns = slice(columns.start, columns.stop)

    def views(self, vector: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the parts of ``vector``, laid out as this region's is, by tensor name."""
        parts = vector.split([spec.numel for spec in self.schema.tensors])
        pairs = zip(self.schema.tensors, parts, strict=True)
        return {spec.name: part.view(spec.shape) for spec, part in pairs}

    @torch.no_grad()
    def adopt(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        """Take over the values of ``parameters``, and make the parameters views of the vector."""
        for name, view in self.views(self.vector).items():
            view.copy_(parameters[name])
            parameters[name].data = view

    def load(self, state: AdapterState) -> None:
        """Copy this region of ``state``, which has the whole adapter's schema."""
        tensors = state.tensors()
        parts = [tensors[spec.name][self._index(spec)] for spec in self.schema.tensors]
        self.vector.copy_(torch.cat([part.reshape(-1) for part in parts]))

    def store(self, state: AdapterState) -> None:
        """Write this region into ``state``, which has the whole adapter's schema."""
        tensors = state.tensors()
        views = self.views(self.vector.to("cpu"))
        for spec in self.schema.tensors:
            tensors[spec.name][self._index(spec)] = views[spec.name]

    def _index(self, spec: TensorSpec) -> tuple[slice, slice]:
        rows = slice(None)
        return (self._columns, rows) if spec.factor == "A" else (rows, self._columns)
