"""The median of every coordinate (Yin et al. 2018, arXiv:1803.01498).

While fewer than half of the clinics are arbitrary, each coordinate of the result lies
between two honest values of it. It is not the mean: clinics whose records differ much
pull it less than they would there.
"""

from collections.abc import Sequence

import torch

from fedpeft_strategies.declaration import Declaration
from fedpeft_strategies.robust import Robust, by_coordinate


class Median(Robust):
    """Coordinate-wise median; of an even count, the mean of the two middle values."""

    declaration = Declaration(
        name="median",
        what="alternating rounds; the median of every coordinate of the changes",
        source="Yin et al. 2018, arXiv:1803.01498",
        exact="no",
        linear=False,
        up="P/2",
        down="P/2",
        tolerates="any f < n/2",
    )

    def centre(self, changes: Sequence[torch.Tensor], left_out: int) -> torch.Tensor:
        """Return the median; ``left_out`` clinics make no difference to it."""
        return by_coordinate(changes, _middle)


def _middle(ascending: torch.Tensor) -> torch.Tensor:
    count = len(ascending)
    return (ascending[(count - 1) // 2] + ascending[count // 2]) / 2
