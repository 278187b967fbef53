"""The mean of updates that are cut to one length (Sun et al. 2019, arXiv:1911.07963).

A change longer than ``strategy.max_norm`` is shortened to it, so that a clinic that sends
anything moves the next adapter by at most bound/n, and by 2·bound/n from where an honest
clinic in its place would have. That is all: f such clinics move it by up to f·bound/n in
a direction of their choice, in every round. Without ``max_norm`` the bound is the median
of the round's norms, which lies between two honest norms while fewer than half of the
clinics are arbitrary, and grows if the honest ones' changes grow.
"""

from collections.abc import Sequence

import torch

from fedpeft.adapters import AdapterState
from fedpeft_strategies.declaration import Declaration
from fedpeft_strategies.robust import FiniteFold, Robust
from fedpeft_strategies.strategy import Fold


class NormBound(Robust):
    """Mean of shortened changes; with a fixed ``max_norm`` in the memory of one adapter."""

    declaration = Declaration(
        name="norm-bound",
        what="alternating rounds; the mean of the changes, each no longer than strategy.max_norm",
        source="Sun et al. 2019, arXiv:1911.07963",
        exact="no",
        linear=False,
        up="P/2",
        down="P/2",
        tolerates="any; each moves it by max_norm/n at most",
    )

    def fold(self, number: int, adapter: AdapterState) -> Fold:
        """Begin a round; its updates are kept only where their median norm is the bound."""
        if self.settings.max_norm is None:
            return super().fold(number, adapter)
        return StreamedFold(self, number, adapter, self.settings.max_norm)

    def centre(self, changes: Sequence[torch.Tensor], left_out: int) -> torch.Tensor:
        """Return the mean of the changes, each cut to the median of their norms."""
        norms = torch.tensor([_norm(change) for change in changes], dtype=torch.float64)
        bound = float(norms.quantile(0.5))
        total = torch.zeros(changes[0].shape, dtype=torch.float64)
        for change in changes:
            _add_shortened(total, change, bound)
        return (total / len(changes)).to(changes[0].dtype)


class StreamedFold(FiniteFold):
    """The sum of the shortened changes of one round."""

    def __init__(
        self, strategy: NormBound, number: int, adapter: AdapterState, bound: float
    ) -> None:
        super().__init__(strategy, number, adapter)
        self._bound = bound
        self._total = torch.zeros(self.schema.numel, dtype=torch.float64)

    def take(self, change: torch.Tensor) -> None:
        """Add it, shortened if need be."""
        _add_shortened(self._total, change, self._bound)

    def centre(self, count: int) -> torch.Tensor:
        """Return the mean, in float64."""
        return self._total / count


def _norm(change: torch.Tensor) -> float:
    """Return the Euclidean norm; in float64, where the square of no float32 overflows."""
    return float(torch.linalg.vector_norm(change.double()))


def _add_shortened(total: torch.Tensor, change: torch.Tensor, bound: float) -> None:
    norm = _norm(change)
    total.add_(change, alpha=bound / norm if norm > bound else 1.0)
