"""The optimiser over an adapter's flat vector."""

from typing import cast

import torch

from fedpeft.config import TrainingSettings
from fedpeft.errors import TrainingError


def build_optimizer(
    weights: torch.nn.Parameter, settings: TrainingSettings
) -> torch.optim.Optimizer:
    """Return AdamW (Loshchilov & Hutter 2019), its 8-bit paged form on CUDA, or plain SGD.

    Raises:
        TrainingError: the 8-bit form was asked for where there is no CUDA device.
    """
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(
            [weights], lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
        )
    if settings.optimizer == "sgd":
        return torch.optim.SGD(
            [weights], lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
    if weights.device.type != "cuda":
        raise TrainingError(
            f"training.optimizer = {settings.optimizer!r} needs a CUDA device and this machine "
            'computes on the CPU; use "adamw"'
        )
    from bitsandbytes.optim.adamw import PagedAdamW8bit

    optimizer = PagedAdamW8bit(
        [weights], lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    return cast("torch.optim.Optimizer", optimizer)
