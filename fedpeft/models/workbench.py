"""Keep one base model in memory and hand out adapters on it.

A simulation of a hundred clinics, and a clinic box over a hundred rounds, load
the base once: what differs between clinics and rounds are adapter values.
"""

from pathlib import Path

import torch

from fedpeft.config import AdapterSettings, ComputeDtype, Quantization
from fedpeft.models.adapted import AdaptedModel
from fedpeft.models.base import load_base
from fedpeft.models.hardware import choose_device, choose_dtype


class Workbench:
    """At most one base model, with at most one adapter on it. Not thread-safe."""

    def __init__(self) -> None:
        self._key: tuple[Path, Quantization, torch.dtype, torch.device] | None = None
        self._adapted: AdaptedModel | None = None

    def adapted(
        self,
        directory: Path,
        settings: AdapterSettings,
        *,
        quantization: Quantization,
        dtype: ComputeDtype,
    ) -> AdaptedModel:
        """Return the model of ``directory`` with an adapter of ``settings``, loading what is new.

        Raises:
            ModelError: the base model cannot be loaded.
            AdapterError: the settings do not fit the base model.
        """
        device = choose_device()
        key = (directory.resolve(), quantization, choose_dtype(dtype, device), device)
        if self._adapted is not None and self._key == key and self._adapted.settings == settings:
            return self._adapted
        if self._adapted is not None and self._key == key:
            base = self._adapted.detach()
            # Not kept if the settings do not fit: PEFT leaves a network half changed.
            self._adapted = None
        else:
            self.clear()  # before loading: two bases may not fit
            base = load_base(key[0], quantization=quantization, dtype=key[2], device=device)
        self._key, self._adapted = key, AdaptedModel(base, settings)
        return self._adapted

    def clear(self) -> None:
        """Let go of the base model."""
        self._key = self._adapted = None
