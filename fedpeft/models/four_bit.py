"""Correct what bitsandbytes 0.50 does to 4-bit weights on a CPU.

Knows nothing of models beyond their layers; does nothing to layers on a GPU.
"""

import copy
import functools
from typing import Any, cast

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit
from torch.nn.functional import linear


def correct_on_cpu(network: torch.nn.Module) -> None:
    """Make every 4-bit layer of ``network`` compute with the weights that it was given.

    Two things go wrong in silence. On processors with AVX512-BF16 the weights are
    repacked in place for evaluation, through a copy of eight times their size and
    with coarser scales. And where a layer's input width is no multiple of the
    quantisation block, blocks are taken to begin anew in each row.
    """
    for module in network.modules():
        if isinstance(module, Linear4bit) and module.weight.device.type == "cpu":
            module.support_avx512bf16_for_cpu = False
            if module.in_features % _state(module).blocksize:
                vars(module)["forward"] = functools.partial(_forward, module)


def _state(layer: Linear4bit) -> Any:
    return cast("Any", layer.weight).quant_state


def _forward(layer: Linear4bit, inputs: torch.Tensor) -> torch.Tensor:
    """Multiply with the weights as one long row, whose blocks are where they were made."""
    state = _state(layer)
    long = copy.copy(state)
    long.shape = torch.Size((1, layer.in_features * layer.out_features))
    weight = dequantize_4bit(layer.weight.data, long).reshape(state.shape)
    return linear(inputs, weight.to(inputs.dtype), layer.bias)
