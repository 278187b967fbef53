"""The mean of the updates that lie closest together (Blanchard et al. 2017, arXiv:1703.02757).

A change scores the sum of its squared distances to the n − f − 2 others that are nearest
to it, f being ``strategy.byzantine``; the mean is that of the n − f lowest scores. Among
the neighbours of a chosen change at least n − 2f − 1 are honest, and its score is no higher
than some honest one's. So while at most f clinics are arbitrary, a chosen change lies
within D·√((n − f − 2)/(n − 2f − 1)) of an honest one, D being the largest distance between
two honest changes. With one more, nothing is promised. The distances cost n²/2 passes over
the round's coordinates.
"""

from collections.abc import Sequence
from itertools import combinations

import torch

from fedpeft_strategies.declaration import Declaration
from fedpeft_strategies.robust import BLOCK, Robust


class MultiKrum(Robust):
    """Multi-Krum with m = n − f; needs n ≥ 2f + 3 clinics."""

    declaration = Declaration(
        name="multi-krum",
        what="alternating rounds; the mean of the n - f changes that lie closest together",
        source="Blanchard et al. 2017, arXiv:1703.02757",
        exact="no",
        linear=False,
        up="P/2",
        down="P/2",
        tolerates="f, of n ≥ 2f + 3",
    )

    def centre(self, changes: Sequence[torch.Tensor], left_out: int) -> torch.Tensor:
        """Return the mean of the chosen changes.

        Raises:
            AdapterError: there are fewer than 2f + 3 clinics.
        """
        least = 2 * self.settings.byzantine + 3
        chosen = chosen_by_krum(changes, self.arbitrary(len(changes), left_out, least))
        total = torch.zeros(changes[0].shape, dtype=torch.float64)
        for index in chosen:
            total += changes[index]
        return (total / len(chosen)).to(changes[0].dtype)


def chosen_by_krum(changes: Sequence[torch.Tensor], arbitrary: int) -> list[int]:
    """Return the places of the n − f changes with the lowest scores, lowest first."""
    count = len(changes)
    distances = _squared_distances(changes)
    # The nearest of all is each change itself, at distance 0.
    nearest = distances.sort(dim=1).values[:, 1 : count - arbitrary - 1]
    order = nearest.sum(dim=1).argsort(stable=True)
    return order[: count - arbitrary].tolist()


def _squared_distances(changes: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return ‖x_i − x_j‖², float64 (changes, changes).

    By differences: |x|² + |y|² − 2xy would lose the distances between honest changes
    beside what a large x leaves in the rounding.
    """
    result = torch.zeros(len(changes), len(changes), dtype=torch.float64)
    for start in range(0, changes[0].numel(), BLOCK):
        block = slice(start, start + BLOCK)
        for i, j in combinations(range(len(changes)), 2):
            difference = changes[i][block].double() - changes[j][block]
            result[i, j] += difference.dot(difference)
    return result + result.T
