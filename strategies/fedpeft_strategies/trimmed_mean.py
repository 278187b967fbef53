"""The mean of every coordinate without its extremes (Yin et al. 2018, arXiv:1803.01498).

Of each coordinate the f smallest and f largest values are dropped, f being
``strategy.byzantine``. While at most f clinics are arbitrary, each coordinate of the
result lies between two honest values of it. With one more, nothing is promised.
"""

from collections.abc import Sequence

import torch

from fedpeft_strategies.declaration import Declaration
from fedpeft_strategies.robust import Robust, by_coordinate


class TrimmedMean(Robust):
    """Coordinate-wise trimmed mean; needs n ≥ 2f + 1 clinics."""

    declaration = Declaration(
        name="trimmed-mean",
        what="alternating rounds; the mean of every coordinate without its f extremes at each end",
        source="Yin et al. 2018, arXiv:1803.01498",
        exact="no",
        linear=False,
        up="P/2",
        down="P/2",
        tolerates="f, of n ≥ 2f + 1",
    )

    def centre(self, changes: Sequence[torch.Tensor], left_out: int) -> torch.Tensor:
        """Return the trimmed mean.

        Raises:
            AdapterError: there are fewer than 2f + 1 clinics.
        """
        least = 2 * self.settings.byzantine + 1
        cut = self.arbitrary(len(changes), left_out, least)
        return by_coordinate(changes, lambda rows: rows[cut : len(rows) - cut].mean(dim=0))
