"""Which range of values a clinic's weighted coordinates are quantised in, round by round.

Too narrow a range clips, too wide a one wastes bits. It is public, so it is made
of public things alone: the job, and the sums that the server learns anyway.
"""

import math

import numpy as np

from fedpeft.adapters import Factors
from fedpeft.config import FederationSettings, TrainingSettings
from fedpeft.protocol import TRAIN, Job, RankTerms
from fedpeft.secagg import SecureSum

_TOLERATED = 1e-4
"""The part of all coordinates that may be clipped before the range is widened."""
_WIDEN, _NARROW, _ROOM = 4.0, 0.5, 2.0
_UNKNOWN_ROWS = 1000
"""Rows of a clinic, as long as no sum has told their mean."""


class Ranges:
    """The range of the next round of one run.

    A round that sends factor A says nothing of one that sends B, and where clinics count
    alike a coordinate is a change, not rows times a change.
    """

    def __init__(self, settings: FederationSettings) -> None:
        self._fixed = settings.aggregation.limit
        self._training = settings.training
        self._first = first_limit(settings.training)
        self._found: dict[tuple[Factors, bool], float] = {}

    def limit(self, sends: Factors, ranks: RankTerms | None) -> float:
        """Return the range of a round in which clinics send ``sends``."""
        if self._fixed is not None:
            return self._fixed
        alike = ranks is not None and ranks.alike
        first = first_limit(self._training) / _UNKNOWN_ROWS if alike else self._first
        return self._found.get((sends, alike), first)

    def follow(self, found: float, sent: Factors | None, ranks: RankTerms | None) -> None:
        """Take over what a round suggests for the next like it; ``sent`` is None for round 0."""
        if sent is None:
            self._first = found
        else:
            self._found[sent, ranks is not None and ranks.alike] = found


def first_limit(training: TrainingSettings, rows: float = _UNKNOWN_ROWS) -> float:
    """Return a range for clinics of ``rows`` training rows, in rows times change.

    AdamW moves a coordinate by about the learning rate a step at most (Kingma and Ba
    2015, arXiv:1412.6980, 2.1), so a clinic's weighted change is below
    rows · steps · rate. Eight times that leaves room for clinics of three times as
    many rows and steps.
    """
    steps = training.local_steps
    if steps is None:
        steps = (training.local_epochs or 1) * math.ceil(rows / training.batch_size)
    return 8.0 * rows * steps * training.learning_rate


def next_limit(kind: str, job: Job, total: SecureSum, rows: int) -> float:
    """Return the range for the round after ``total`` was summed.

    After an evaluation only the mean of the training rows is new. After training the
    range follows the sum: where many coordinates were clipped it widens fourfold, else
    it narrows by half at most, and stays twice the largest sum.
    """
    limit = job.aggregation.limit
    if kind != TRAIN:
        return first_limit(job.training, rows / len(total.survivors)) if job.round == 0 else limit
    if total.integers["clipped"] > _TOLERATED * total.coordinates.size * len(total.survivors):
        return _WIDEN * limit
    largest = float(np.abs(total.coordinates).max())
    return max(_NARROW * limit, min(limit, _ROOM * largest))
