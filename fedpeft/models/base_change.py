"""Products BA that were learnt and now belong to the base model's weights (FedEx-LoRA, FLoRA).

They are added to the weights in memory; the files, and with them the fingerprint, stay.
What was added is not taken off again: another list of products begins with the base model
loaded anew, so that it is exactly what the files hold.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from transformers.pytorch_utils import Conv1D

from fedpeft.adapters import AdapterState
from fedpeft.adapters.product import pairs
from fedpeft.errors import AdapterError, ModelError
from fedpeft.models.base import BaseModel

_PREFIX = "base_model.model."
"""What PEFT puts before a module's name in the network."""

Products = Sequence[tuple[str, AdapterState]]
"""Digests, by which products are known again, and both factors of each, of any rank."""


class BaseChange:
    """The products that were added to ``base``, in order (arXiv:2410.09432, 2409.05976).

    Where the weights are not float32, their sum is kept in float32 beside them. Otherwise
    rounding would drop most of a product that is small beside the weights, every time.
    """

    def __init__(self, base: BaseModel) -> None:
        self._base = base
        self._added: list[tuple[str, float]] = []
        self._exact: dict[str, torch.Tensor] = {}

    def begins(self, products: Products, scale: float) -> bool:
        """Say whether what was added are the first of ``products``, at the same ``scale``."""
        return len(self._added) <= len(products) and all(
            known == digest and math.isclose(at, scale, rel_tol=1e-9)
            for (known, at), (digest, _) in zip(self._added, products, strict=False)
        )

    def extend(self, products: Products, scale: float) -> None:
        """Add ``scale`` · B · A of the products that follow those which were added.

        Raises:
            ModelError: the base model is quantised.
            AdapterError: a product is of a module that the base model does not have.
        """
        new = products[len(self._added) :]
        if not new:
            return
        if self._base.quantization != "none":
            raise ModelError(
                f"what was learnt cannot be added to a base model quantised to "
                f"{self._base.quantization}: its codes are so coarse that nothing of it would be "
                'left; use strategy "alternating", or model.quantization = "none"'
            )
        for digest, state in new:
            for name, layer, (b, a) in self._layers(state):
                self._add(name, layer, b, a, scale)
            self._added.append((digest, scale))

    def _layers(
        self, state: AdapterState
    ) -> Iterator[tuple[str, torch.nn.Module, tuple[torch.Tensor, torch.Tensor]]]:
        names = dict.fromkeys(spec.module for spec in state.schema.tensors)
        for name, factors in zip(names, pairs(state), strict=True):
            try:
                found = self._base.network.get_submodule(name.removeprefix(_PREFIX))
            except AttributeError:
                raise AdapterError(
                    f"the base model has no module {name}, to which a product should be added; "
                    "install the same fedpeft release on both sides"
                ) from None
            # LoRA lies around the layer that it was put on.
            yield name, getattr(found, "base_layer", found), factors

    @torch.no_grad()
    def _add(
        self, name: str, layer: torch.nn.Module, b: torch.Tensor, a: torch.Tensor, scale: float
    ) -> None:
        weight = self._own_weight(layer)
        product = (b.to(weight.device, torch.float32) @ a.to(weight.device, torch.float32)) * scale
        if isinstance(layer, Conv1D):  # its weight is (inputs, outputs)
            product = product.T
        if weight.dtype == torch.float32:
            weight.add_(product)
            return
        if name not in self._exact:
            self._exact[name] = weight.detach().to("cpu", torch.float32)
        weight.copy_(self._exact[name].add_(product.cpu()))

    def _own_weight(self, layer: torch.nn.Module) -> torch.nn.Parameter:
        """Return the layer's weight; a head that shares the embeddings' gets one of its own."""
        weight = layer.get_parameter("weight")
        embeddings = self._base.network.get_input_embeddings().get_parameter("weight")
        if weight is embeddings:
            weight = torch.nn.Parameter(weight.detach().clone(), requires_grad=False)
            layer.register_parameter("weight", weight)
        return weight
