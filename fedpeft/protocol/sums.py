"""What a secure sum adds up beside the coordinates, and what model it belongs to."""

import hashlib
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedpeft.config import PrivacySettings
from fedpeft.config.schedule import learning_rate
from fedpeft.errors import NotFinite
from fedpeft.privacy.skellam import grid_for
from fedpeft.protocol.job import Job
from fedpeft.protocol.records import KINDS
from fedpeft.secagg import STAGES, Quantiser

MESSAGE_TYPES: Final = frozenset(
    {*KINDS, *(f"{kind}.{stage}" for kind in KINDS for stage in STAGES)}
)
"""Everything that a server may ask: at once (``sealed``), or in the steps of a secure sum."""

INTEGERS: Final = ("num-examples", "nll", "tokens", "clipped", "within-clip")
"""Training rows, summed loss in fixed point, target tokens, clipped coordinates, and
whether the update was within the clip norm of clinic-level privacy (0 or 1)."""
VERDICTS: Final = ("verdicts", "accepted")
"""Of clinics that tell their verdict on an adapter: 1, and 1 again if they have taken it."""
_FRACTION_BITS: Final = 16


def levels_of(job: Job) -> tuple[int, ...]:
    """Return the ranks at which clinics take part, ascending."""
    if job.ranks is None:
        return (job.adapter.rank,)
    return tuple(sorted({*job.ranks.of.values(), job.ranks.others}))


def integers_of(job: Job) -> tuple[str, ...]:
    """Return the integers that are summed under a job.

    Where ranks differ, the weights of those who trained at least the columns of each
    level are summed too, in the same vector, as a column's divisor; and the verdicts on
    the adapter if the job asks for them.
    """
    asked = VERDICTS if job.asks_verdict else ()
    if job.ranks is None:
        return (*INTEGERS, *asked)
    return (*INTEGERS, *asked, *(weight_of_level(level) for level in levels_of(job)))


def weight_of_level(level: int) -> str:
    """Return the name of the integer: the weights of all clinics of that rank or above."""
    return f"weight-of-rank-{level}"


GRID_BITS: Final = 24
"""Bits of a coordinate under distributed noise: whole numbers, which float32 holds exactly."""


def grid_limit() -> float:
    """Return the range of such a coordinate, so that its quantisation changes nothing."""
    return float(Quantiser(GRID_BITS, 1.0).centre)


def wrapped(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return whole numbers modulo 2^24 - 1, int64 from -(2^23 - 1) to 2^23 - 1.

    Of the sum of wrapped vectors, wrapped again, the whole is the sum of the vectors
    themselves, wrapped: so of distributed noise nothing is lost that the analysis of
    the sum counts on. Values that are merely cut off would not add up.
    """
    centre = int(grid_limit())
    return (values + centre) % (2 * centre + 1) - centre


def counts_alike(job: Job) -> bool:
    """Say whether every clinic counts the same in a mean, rather than by its rows.

    Noise that is added to a sum hides a clinic only as well as the largest weight allows,
    and weights that are summed by rank may show a clinic's rows.
    """
    noisy = job.privacy is not None and job.privacy.mechanism != "local"
    return noisy or (job.ranks is not None and job.ranks.alike)


def on_grid(privacy: PrivacySettings | None) -> bool:
    """Say whether clinics sum whole numbers, as distributed noise needs."""
    return privacy is not None and privacy.mechanism == "distributed"


def value_of_unit(job: Job, coordinates: int) -> float:
    """Return the change of a coordinate that one unit of a clinic's summed vector stands for.

    Under distributed noise the vector counts steps of a grid in the direction of the
    gradient, of which the round takes one step of gradient descent.
    """
    if job.privacy is None or not on_grid(job.privacy):
        return 1.0
    rate = learning_rate(job.training, job.round - 1, job.rounds)
    return -rate * grid_for(job.privacy.clip, coordinates) / job.training.batch_size


def model_digest(job: Job, adapter: bytes) -> bytes:
    """Return the SHA-256 of what the server sent to a clinic: the job and the adapter."""
    text = job.to_json().encode()
    lengths = len(text).to_bytes(8) + len(adapter).to_bytes(8)
    return hashlib.sha256(lengths + text + adapter).digest()


def fixed_point(value: float) -> int:
    """Return a non-negative number in units of 2^-16.

    Raises:
        NotFinite: it is NaN, infinite or negative, so it cannot be summed.
    """
    if not 0 <= value < float("inf"):
        raise NotFinite("the loss here is not a finite number, so it cannot be summed with others")
    return round(value * 2**_FRACTION_BITS)


def from_fixed_point(value: int) -> float:
    """Return what a sum of :func:`fixed_point` numbers stands for."""
    return value / 2**_FRACTION_BITS
