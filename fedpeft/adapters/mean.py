"""The weighted mean of adapters that arrive one after the other.

Holds one float32 vector, however many there are. Knows nothing of clinics, rounds or
what the mean is for.
"""

from dataclasses import replace

import torch

from fedpeft.adapters.schema import AdapterSchema
from fedpeft.adapters.state import DTYPES, AdapterState
from fedpeft.errors import AdapterError

_PIECE = 1 << 20
"""Coordinates that are widened to float32 at once: 4 MiB, the fastest of those measured."""
_FLOAT32 = torch.finfo(torch.float32)


class WeightedMean:
    """Streaming Σ w_i·x_i / Σ w_i over adapter states of one schema, or of a lower rank.

    A state of a lower rank has the first rows of A and columns of B. Each row and column
    is divided by the weight of those who had it; what nobody had is zero.

    Memory is one float32 vector and 4 MiB, beside the state that is being added. The sum
    is rounded to float32 at every addition: the mean of n states is off by at most
    (n + 4)·2⁻²⁴ of the largest value, where all states are alike and so all roundings go
    one way; for a hundred random states it is less than 5·10⁻⁷ of it. Sums must stay
    below float32's 3·10³⁸.
    """

    def __init__(self, schema: AdapterSchema) -> None:
        self._schema = schema
        self._sum: AdapterState | None = AdapterState(
            replace(schema, dtype="float32"), torch.zeros(schema.numel)
        )
        self._weights: dict[int, float] = {}

    def add(self, state: AdapterState, weight: float) -> None:
        """Fold one state in; ``weight`` > 0.

        Raises:
            AdapterError: the weight is not a positive finite number (of float32), or the mean
                was taken already.
            SchemaMismatch: the state differs from the schema in more than a lower rank.
        """
        summed, rank = self._open_sum(), min(state.schema.rank, self._schema.rank)
        expected = self._schema.part(self._schema.factors, rank)
        expected.require(state.schema.hash, source="the update")
        if not _FLOAT32.tiny <= weight <= _FLOAT32.max:
            raise AdapterError(f"an update's weight must be positive and finite, not {weight}")
        if rank == self._schema.rank:
            _add_whole(summed.values, state.values, weight)
        else:
            _add_first(summed, state, weight)
        self._weights[rank] = self._weights.get(rank, 0.0) + weight

    @property
    def weight(self) -> float:
        """Σ w_i so far, over states of every rank."""
        return sum(self._weights.values())

    def result(self) -> AdapterState:
        """Return the mean in the schema's dtype; the mean is then used up.

        Raises:
            AdapterError: nothing was added, or the mean was taken already.
        """
        summed = self._open_sum()
        if not self._weights:
            raise AdapterError("the mean of no updates is undefined")
        self._sum = None
        if list(self._weights) == [self._schema.rank]:
            summed.values.div_(self.weight)
        else:
            self._divide_by_column(summed)
        return AdapterState(self._schema, summed.values.to(DTYPES[self._schema.dtype]))

    def _open_sum(self) -> AdapterState:
        if self._sum is None:
            raise AdapterError("this mean was taken already; begin another for other updates")
        return self._sum

    def _divide_by_column(self, summed: AdapterState) -> None:
        columns = range(self._schema.rank)
        reached = [sum(w for r, w in self._weights.items() if r > column) for column in columns]
        divisors = torch.tensor([weight or 1.0 for weight in reached])
        tensors = summed.tensors()
        for spec in summed.schema.tensors:
            tensors[spec.name].div_(divisors[:, None] if spec.factor == "A" else divisors)


def _add_whole(summed: torch.Tensor, values: torch.Tensor, weight: float) -> None:
    """Add piece by piece: torch would widen all of a float16 vector at once otherwise."""
    if values.dtype == summed.dtype:
        summed.add_(values, alpha=weight)
        return
    widened = torch.empty(min(_PIECE, len(values)))
    for total, piece in zip(summed.split(_PIECE), values.split(_PIECE), strict=True):
        total.add_(widened[: len(piece)].copy_(piece), alpha=weight)


def _add_first(summed: AdapterState, state: AdapterState, weight: float) -> None:
    """Add to the first rows of A and columns of B."""
    tensors = summed.tensors()
    for name, values in state.tensors().items():
        rows, columns = values.shape
        tensors[name][:rows, :columns].add_(values, alpha=weight)
