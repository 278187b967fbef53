"""What a secure sum adds up beside the coordinates, and what model it belongs to."""

import hashlib
from typing import Final

from fedpeft.errors import NotFinite
from fedpeft.protocol.job import Job
from fedpeft.protocol.records import KINDS
from fedpeft.secagg import STAGES

MESSAGE_TYPES: Final = frozenset(
    {*KINDS, *(f"{kind}.{stage}" for kind in KINDS for stage in STAGES)}
)
"""Everything that a server may ask: at once (``sealed``), or in the steps of a secure sum."""

INTEGERS: Final = ("num-examples", "nll", "tokens", "clipped")
"""Training rows, summed loss in fixed point, target tokens, clipped coordinates."""
_FRACTION_BITS: Final = 16


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
