"""From weighted float32 coordinates to words of few bits, without bias, and back from sums.

A clinic's coordinate u = weight * x becomes one of the levels 0 to 2h, where
h = 2^(bits - 1) - 1, the centre h stands for zero and neighbouring levels are
``limit / h`` apart. Rounding is stochastic: a value between two levels takes the
upper one with the probability of its distance from the lower one. The sum over the
clinics is thereby right on average, and at most one level wrong for each clinic.

This module must not know of clinics, masks or models.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import BadVector, NotFinite
from fedpeft.keystream import KEYSTREAM_WORD, Keystream

_CHUNK = 32 * 1024
"""Values rounded at once: few calls, and the buffers still stay in the second-level cache."""

_LARGEST_WEIGHT = 2**53
"""Beyond it float64 cannot hold each weight exactly."""

# Far inside what float64 holds, so that no factor or sum of levels overflows.
_LEAST_LIMIT, _LARGEST_LIMIT = 1e-30, 1e30

# The noise has this many bits. With 28 the sum of a level (below 2^24) and the noise
# is exact in float64 for every value that lies on a level, so such a value, zero
# first of all, is never moved; the bias of the others is below 2^-28 of a level.
_NOISE_BITS = 28


@dataclass(frozen=True)
class Quantiser:
    """How one clinic's weighted coordinates become words of ``bits`` bits, and sums values.

    ``bits`` is 2 to 24. ``limit``, 1e-30 to 1e30, is the public range: coordinates are
    clipped to [-limit, limit] after weighting. ``BadVector`` is raised for others.
    """

    bits: int
    limit: float

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 24:
            raise BadVector(f"values cannot be quantised to {self.bits} bits; use 2 to 24")
        if not _LEAST_LIMIT <= self.limit <= _LARGEST_LIMIT:
            raise BadVector(
                f"the range of quantised values is {self.limit}; "
                f"it must be {_LEAST_LIMIT} to {_LARGEST_LIMIT}"
            )

    @property
    def centre(self) -> int:
        """The level of zero, h = 2^(bits - 1) - 1. The highest level is twice that."""
        return 2 ** (self.bits - 1) - 1

    @property
    def step(self) -> float:
        """The distance of neighbouring levels, in the unit of a weighted coordinate."""
        return self.limit / self.centre

    def quantise(self, values: NDArray[np.float32], weight: int, out: NDArray[np.uint32]) -> int:
        """Write the words of ``weight * values`` to ``out`` and return how many were clipped.

        ``values`` is float32 (n,), ``out`` uint32 (n,); words are 0 to ``2 * centre``.
        Computed in float64, where a float32 times a weight below 2^29 is exact. The
        rounding noise is a ChaCha20 stream of its own: that it cannot be guessed keeps
        a value from being read out of many roundings.

        Raises ``NotFinite`` if a value is NaN or infinite, ``BadVector`` if the weight
        is below 1 or above 2^53 or the arrays differ in length; nothing is written then.
        """
        return Rounding(self, weight).round(values, out)

    def dequantise(
        self, sums: NDArray[np.uint32] | NDArray[np.uint64], summands: int
    ) -> NDArray[np.float64]:
        """Return the sums of weighted coordinates that sums of words stand for, float64 (n,).

        ``sums`` holds, for each coordinate, the sum of the words of ``summands`` clinics.

        Raises ``BadVector`` if a sum is larger than that many clinics can make: masks
        are left in it.
        """
        if summands < 1 or (sums.size and int(sums.max()) > 2 * self.centre * summands):
            raise BadVector(
                f"a sum of the vector is not one of {summands} clinics: masks are left in it"
            )
        restored = sums.astype(np.float64)
        restored -= summands * self.centre
        restored *= self.step
        return restored


class Rounding:
    """Quantises one update part by part, with the same buffers and one stream of noise.

    Raises ``BadVector`` if the weight is below 1 or above 2^53.
    """

    def __init__(self, quantiser: Quantiser, weight: int) -> None:
        if not 1 <= weight <= _LARGEST_WEIGHT:
            raise BadVector(f"an update cannot have weight {weight}; it must be 1 to 2^53")
        self._weight = float(weight)
        self._limit = quantiser.limit
        self._levels_per_unit = quantiser.centre / quantiser.limit
        self._centre = float(quantiser.centre)
        self._stream = Keystream.fresh()
        self._levels = np.empty(_CHUNK, np.float64)
        self._noise = np.empty(_CHUNK, np.float64)
        self._random = np.empty(_CHUNK, KEYSTREAM_WORD)

    def round(self, values: NDArray[np.float32], out: NDArray[np.uint32]) -> int:
        """Write the words of the next part and return how many coordinates were clipped.

        Raises what ``Quantiser.quantise`` raises, before anything of the part is written.
        """
        if values.shape != out.shape:
            raise BadVector(f"{values.size} values cannot be quantised to {out.size} words")
        if not values.size:
            return 0
        largest = max(float(values.max()), -float(values.min()))
        if not math.isfinite(largest):
            raise NotFinite("the update holds NaN or infinity, so it cannot be summed with others")
        clips = self._weight * largest > self._limit
        return sum(
            self._round(values[start : start + _CHUNK], out[start : start + _CHUNK], clips)
            for start in range(0, values.size, _CHUNK)
        )

    def _round(self, values: NDArray[np.float32], out: NDArray[np.uint32], clips: bool) -> int:
        levels = self._levels[: values.size]
        np.copyto(levels, values)
        levels *= self._weight
        clipped = self._clip(levels) if clips else 0
        levels *= self._levels_per_unit
        levels += self._centre
        levels += self._next_noise(values.size)
        # Conversion drops the fraction, which is the floor from zero on; a rounding error
        # below zero goes to zero too, and one above the last level is smaller than what
        # the noise lacks to 1. As signed integers, to which processors convert faster.
        np.copyto(out.view(np.int32), levels, casting="unsafe")
        return clipped

    def _clip(self, coordinates: NDArray[np.float64]) -> int:
        outside = int(np.count_nonzero(np.abs(coordinates) > self._limit))
        if outside:
            np.clip(coordinates, -self._limit, self._limit, out=coordinates)
        return outside

    def _next_noise(self, size: int) -> NDArray[np.float64]:
        random, noise = self._random[:size], self._noise[:size]
        self._stream.fill(random)
        random >>= 32 - _NOISE_BITS
        np.copyto(noise, random.view(np.int32))
        noise *= 2.0**-_NOISE_BITS
        return noise


def headroom_width(bits: int, clinics: int) -> int:
    """Return the bits that a sum of ``clinics`` words of ``bits`` bits takes.

    That is ceil(log2(clinics * (2^bits - 1) + 1)), in exact integer arithmetic.

    Raises ``BadVector`` if it is more than 32, the width of the accumulator, or if
    there is no clinic or no bit.
    """
    if bits < 1 or clinics < 1:
        raise BadVector(f"words of {bits} bits of {clinics} clinics cannot be summed")
    width = (clinics * (2**bits - 1)).bit_length()
    if width > 32:
        raise BadVector(
            f"sums of {clinics} words of {bits} bits take {width} bits, more than 32; "
            "use fewer bits"
        )
    return width
