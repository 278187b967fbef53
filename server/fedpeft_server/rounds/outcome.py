"""What a round leaves beside its adapter: a strategy's memory, and products for the base model."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import save

from fedpeft.adapters import AdapterSchema, AdapterState, combined, stacked
from fedpeft.adapters.peft_directory import read_tensors
from fedpeft.storage import write_atomically

_MEMORY, _PRODUCT = "strategy.safetensors", "product.safetensors"
_ADVICE = (
    "remove the directory of that round and of those after it, and the run goes on from the one "
    "before"
)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the rounds up to one became.

    ``memory`` is what the strategy must not forget; ``increments`` are the products BA that
    were added to the base model, in order.
    """

    adapter: AdapterState
    memory: Mapping[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])
    increments: tuple[AdapterState, ...] = ()

    @cached_property
    def whole(self) -> AdapterState:
        """The adapter with all increments: what it takes on the unchanged base."""
        return combined(self.adapter, self.increments)


def save_outcome(outcome: Outcome, directory: Path, *, new: int) -> None:
    """Write what is there beside the adapter; the last ``new`` increments become one product.

    Raises:
        StorageError: the directory cannot be written.
    """
    if outcome.memory:
        _write(outcome.memory, directory / _MEMORY)
    if new:
        product = stacked([(one, 1.0) for one in outcome.increments[-new:]])
        _write(product.tensors(), directory / _PRODUCT)


def load_memory(directory: Path) -> dict[str, torch.Tensor]:
    """Return the strategy's memory that a round left.

    Raises:
        AdapterError: the file is missing or damaged.
    """
    return read_tensors(directory / _MEMORY, _ADVICE)


def load_product(directory: Path, schema: AdapterSchema) -> AdapterState:
    """Return what a round added to the base model of ``schema``.

    Raises:
        AdapterError: the file is missing or damaged.
    """
    tensors = read_tensors(directory / _PRODUCT, _ADVICE)
    first = next(iter(schema.tensors))
    values = tensors.get(first.name)
    rank = 1 if values is None else values.shape[0 if first.factor == "A" else 1]
    return AdapterState.from_tensors(tensors, schema.of_rank(max(1, rank)))


def _write(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    whole = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    write_atomically(path, save(whole, {"format": "pt"}))
