"""How far the product of means lies from the mean of products, found from a sketch.

Σ p_i·B_i·A_i has outputs × inputs numbers a module, too many to keep. Its image of a few
random directions has as many as an adapter, and tells its length.
"""

import torch

from fedpeft.adapters import AdapterState, pairs

_SEED = 20250205
"""Probes are the same in every round, so that rounds can be compared."""


class ProductError:
    """‖Σ p_i·B_i·A_i − B̄·Ā‖ / ‖Σ p_i·B_i·A_i‖ in the Frobenius norm, over all modules.

    For each module it draws Ω (inputs, probes) of standard normal numbers and keeps
    Σ w_i·B_i·(A_i·Ω), as ‖MΩ‖²/probes has the mean ‖M‖². A norm found so has a relative
    standard error of at most 1/√(2·probes), and their quotient of at most about 1/√probes:
    18 % at 32 probes. That is for products of rank 1 in a single module; more of either
    lower it. Memory is O(probes·(outputs + inputs)) a module, however many clinics.
    """

    def __init__(self, adapter: AdapterState, probes: int = 32) -> None:
        self._adapter = adapter
        generator = torch.Generator().manual_seed(_SEED)
        modules = list(pairs(adapter))
        self._probes = [torch.randn(a.shape[1], probes, generator=generator) for _, a in modules]
        self._images = [torch.zeros(b.shape[0], probes, dtype=torch.float64) for b, _ in modules]
        self._weight = 0.0

    def add(self, change: AdapterState, weight: float) -> None:
        """Take in the product of a clinic that changed the adapter by ``change``."""
        self._weight += weight
        for image, seen in zip(self._images, self._seen(self._adapter.plus(change)), strict=True):
            image.add_(seen, alpha=weight)

    def of(self, adapter: AdapterState) -> float | None:
        """Return the estimate for the product of ``adapter``; None: the mean product is zero."""
        off = whole = 0.0
        for image, seen in zip(self._images, self._seen(adapter), strict=True):
            mean = image / self._weight
            off += float((mean - seen).square().sum())
            whole += float(mean.square().sum())
        return (off / whole) ** 0.5 if whole else None

    def _seen(self, state: AdapterState) -> list[torch.Tensor]:
        """Return BAΩ of every module, float64 (outputs, probes)."""
        return [
            (b.float() @ (a.float() @ omega)).double()
            for (b, a), omega in zip(pairs(state), self._probes, strict=True)
        ]
