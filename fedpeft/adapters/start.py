"""The adapter that training starts from. Knows no base model, only the adapter's shape."""

import math

import torch

from fedpeft.adapters.schema import AdapterSchema
from fedpeft.adapters.state import DTYPES, AdapterState


def initial_state(schema: AdapterSchema, seed: int) -> AdapterState:
    """Return LoRA's start: A Kaiming-uniform (a = √5, as PEFT draws it), B zero, so BA = 0."""
    generator = torch.Generator().manual_seed(seed)
    state = AdapterState(schema, torch.zeros(schema.numel, dtype=DTYPES[schema.dtype]))
    for spec, tensor in zip(schema.tensors, state.tensors().values(), strict=True):
        if spec.factor == "A":
            torch.nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=generator)
    return state
