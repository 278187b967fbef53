"""Bound what one unit of privacy can do to a sum (Abadi et al. 2016, arXiv:1607.00133)."""

import math

import torch


def clipped(gradient: torch.Tensor, clip: float) -> torch.Tensor | None:
    """Return ``gradient`` in float64, scaled down to an L2 norm of at most ``clip``.

    None where it holds NaN or infinity, and the caller adds nothing.

    Formal guarantee: what is returned has norm at most ``clip`` up to float64 rounding,
    for every ``gradient`` whatsoever. A gradient that is not finite counts as zero
    instead of stopping the round, because stopping could be seen from outside: whoever
    chooses the adapter could make it overflow on one particular record, and learn from
    the refusal whether that record is here.
    """
    exact = gradient.to(torch.float64)
    norm = float(torch.linalg.vector_norm(exact))
    if not math.isfinite(norm):
        return None
    return exact.mul_(clip / max(norm, clip))
