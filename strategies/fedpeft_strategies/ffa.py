"""FFA-LoRA: A is frozen, B is averaged (Sun et al. 2024, arXiv:2403.12313).

As all clinics share A, the mean of B gives the mean of the products BA exactly. With
``reorthonormalize`` (FedSVD, arXiv:2505.12805) each round ends with BA = UΣVᵀ, B = UΣ
and A = Vᵀ: A's rows are orthonormal, so that a change of B is as long as that of BA.
"""

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from fedpeft.adapters import AdapterState, Mixing, WeightedMean, orthonormal, pairs
from fedpeft_strategies.declaration import Declaration
from fedpeft_strategies.strategy import Aggregated, Fold, Strategy


class Ffa(Strategy):
    """Weighted mean of the changes of B; O(1) adapters in memory."""

    declaration = Declaration(
        name="ffa",
        what="A is frozen, mean of B; FedSVD with reorthonormalize",
        source="FFA-LoRA, arXiv:2403.12313; FedSVD, arXiv:2505.12805",
        exact="yes",
        linear=True,
        up="dr",
        down="dr",
        ranks="nested",
        mechanisms=frozenset({"local", "distributed", "central"}),
    )

    def start(self, adapter: AdapterState) -> AdapterState:
        """Return the adapter, under ``reorthonormalize`` with orthonormal rows of A."""
        return orthonormal(adapter, "A")[0] if self.settings.reorthonormalize else adapter

    def trains(self, number: int) -> Literal["B"]:
        """Return ``"B"``."""
        return "B"

    def fold(self, number: int, adapter: AdapterState) -> Fold:
        """Begin the mean of the changes of B."""
        return _FfaFold(adapter, self.settings.reorthonormalize)


class _FfaFold(Fold):
    def __init__(self, adapter: AdapterState, reorthonormalize: bool) -> None:
        self._adapter, self._reorthonormalize = adapter, reorthonormalize
        self._mean = WeightedMean(adapter.schema.part("B"))

    def add(self, change: AdapterState, weight: float) -> None:
        self._mean.add(change, weight)

    def result(self) -> Aggregated:
        mean = self._adapter.part("B").plus(self._mean.result())
        adapter = self._adapter.with_part(mean)
        return _singular(adapter) if self._reorthonormalize else Aggregated(adapter=adapter)


def _singular(adapter: AdapterState) -> Aggregated:
    """Turn every pair into B = UΣ, A = Vᵀ of BA = UΣVᵀ.

    A follows from its mixing, as the clinics compute it; B is then what BA is in the rows
    of that A.
    """
    mixing = Mixing("A", np.stack([_turn(b, a) for b, a in pairs(adapter)]))
    turned = mixing.applied(adapter)
    for (b, a), (new_b, new_a) in zip(pairs(adapter), pairs(turned), strict=True):
        new_b.copy_(b.double() @ (a.double() @ new_a.double().T))
    return Aggregated(adapter=turned, mixing=mixing)


def _turn(b: torch.Tensor, a: torch.Tensor) -> NDArray[np.float64]:
    """Return M (rank, rank) with MA = Vᵀ, where BA = UΣVᵀ.

    A = LQ with orthonormal rows of Q, BL = UΣWᵀ, so Vᵀ = WᵀQ = WᵀL⁻¹A. W is orthogonal
    also where B is zero or of a lower rank. L is near the identity, as A was orthonormal
    before; its pseudo-inverse is for rows beyond the width of the module, which stay zero.
    """
    lower = np.linalg.qr(a.double().numpy().T)[1].T
    small = np.linalg.qr(b.double().numpy() @ lower)[1]
    turn = np.zeros((len(lower), len(lower)))
    turn[: lower.shape[1]] = np.linalg.svd(small)[2] @ np.linalg.pinv(lower)
    return turn
