"""Keep one base model in memory and hand out adapters on it.

A simulation of a hundred clinics, and a clinic box over a hundred rounds, load
the base once: what differs between clinics and rounds are adapter values.
"""

from pathlib import Path

import torch

from fedpeft.config import AdapterSettings, ComputeDtype, Quantization
from fedpeft.models.adapted import AdaptedModel
from fedpeft.models.base import load_base
from fedpeft.models.base_change import BaseChange, Products
from fedpeft.models.hardware import choose_device, choose_dtype


class Workbench:
    """At most one base model, with at most one adapter on it. Not thread-safe."""

    def __init__(self) -> None:
        self._key: tuple[Path, Quantization, torch.dtype, torch.device] | None = None
        self._change: BaseChange | None = None
        self._adapted: AdaptedModel | None = None

    def adapted(
        self,
        directory: Path,
        settings: AdapterSettings,
        *,
        quantization: Quantization,
        dtype: ComputeDtype,
        rest_rank: int = 0,
        base_change: Products = (),
    ) -> AdaptedModel:
        """Return the model of ``directory`` with an adapter of ``settings``, loading what is new.

        ``rest_rank`` is as in :class:`AdaptedModel`. The products of ``base_change`` are
        added to the base model's weights at the adapter's scale alpha/rank, and no others.

        Raises:
            ModelError: the base model cannot be loaded, or not be changed.
            AdapterError: the settings, or the products, do not fit the base model.
        """
        device = choose_device()
        key = (directory.resolve(), quantization, choose_dtype(dtype, device), device)
        scale = settings.alpha / settings.rank
        model, change = self._adapted, self._change
        if self._key != key or not (change and change.begins(base_change, scale)):
            model = change = None
        # Not kept if anything fails: PEFT leaves a network half changed.
        self.clear()
        if model is None or change is None:
            base = load_base(key[0], quantization=quantization, dtype=key[2], device=device)
            change = BaseChange(base)
            model = AdaptedModel(base, settings, rest_rank=rest_rank)
        elif (model.settings, model.rest_rank) != (settings, rest_rank):
            model = AdaptedModel(model.detach(), settings, rest_rank=rest_rank)
        change.extend(base_change, scale)
        self._key, self._change, self._adapted = key, change, model
        return model

    def clear(self) -> None:
        """Let go of the base model."""
        self._key = self._change = self._adapted = None
