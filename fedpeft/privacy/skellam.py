"""Skellam noise on a grid of whole numbers: the shares of several clinics add up exactly.

The difference of two Poisson numbers of mean mu / 2 has variance mu, and a sum of such
differences is one again (Agarwal, Kairouz and Liu 2021, "The Skellam mechanism for
differentially private federated learning"). This module must not know of clinics.
"""

import math
from decimal import Context, Decimal
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import PrivacyError
from fedpeft.privacy.sampling import CHUNK, SecretDraws, Uniforms

_LARGEST_VARIANCE = 2.0**50
"""Beyond it the logarithms of probabilities would be wrong by more than 1e-7."""

_TABLE_BELOW = 256.0
"""Means from which on Poisson numbers are drawn by rejection, and not from a table."""

_LEAST_KEPT = 16.0
"""Where Stirling's series ends. A Poisson number of mean 256 is below it with probability 1e-86."""

_HAT = 1.127
"""Hörmann's 1.1239 is up to 0.08 % too small for means below 1000: some numbers near
1.7 standard deviations would come too seldom. The tests check that this is enough."""

_LARGEST_COORDINATE = 2.0**52
_OVERHEAD = 100


class SkellamNoise(SecretDraws):
    """Symmetric Skellam noise from a cryptographic stream.

    *Formal guarantee*: noise of variance mu on a vector of whole numbers with the
    ``sensitivities`` (l2, l1) has the Rényi privacy loss of Agarwal et al. 2021, and
    ``draw(d, mu / h)`` of h clinics sums, as whole numbers, to exactly that noise.
    There are no low-order bits. Probabilities deviate from exact ones by a factor
    within 1 +- 1e-10 for variances to 1e9 and ten standard deviations, growing with the
    standard deviation to 1e-7 at the largest variance, 2^50; below a variance of 512
    each is wrong by less than 2^-63. This is an analysis of rounding errors and a
    measurement, not a proof, and holds against who cannot break ChaCha20.
    """

    def draw(self, size: int, variance: float) -> NDArray[np.int64]:
        """Return independent Skellam numbers of mean 0 and ``variance``, int64 (size,).

        ``variance`` is in squared units of the grid. The share of one of h clinics is
        the variance of the whole over h; h counts only clinics sure to take part.

        Raises ``PrivacyError`` unless ``variance`` is above 0 and at most 2^50.
        """
        if not 0.0 < variance <= _LARGEST_VARIANCE:
            raise PrivacyError(
                f"Skellam noise of variance {variance} cannot be drawn; it must be above 0 "
                "and at most 2^50 (with a larger one, make the grid coarser)"
            )
        drawn = np.empty(size, np.int64)
        for start in range(0, size, CHUNK):
            part = drawn[start : start + CHUNK]
            part[...] = self._centred_poisson(part.size, variance / 2)
            part -= self._centred_poisson(part.size, variance / 2)
        return drawn

    def _centred_poisson(self, size: int, mean: float) -> NDArray[np.int64]:
        """Return Poisson numbers less floor(``mean``), which cancels in the difference."""
        if mean < _TABLE_BELOW:
            words = self._uniforms.words(size)
            numbers = np.searchsorted(_poisson_table(mean), words, side="right")
            return numbers.astype(np.int64) - math.floor(mean)
        offsets = np.empty(size, np.int64)
        done = 0
        while done < size:
            candidates = min(CHUNK, (size - done) * 9 // 8 + 16)
            accepted = _accepted(self._uniforms, candidates, mean)[: size - done]
            np.copyto(offsets[done : done + accepted.size], accepted, casting="unsafe")
            done += accepted.size
        return offsets


def _accepted(uniforms: Uniforms, candidates: int, mean: float) -> NDArray[np.float64]:
    """Return the accepted ones of so many candidates, less floor(``mean``).

    Algorithm PTRS of Hörmann 1993, "The transformed rejection method for generating
    Poisson random variables", without the two shortcuts that spare it logarithms.
    """
    u = np.empty(candidates, np.float64)
    v = np.empty(candidates, np.float64)
    uniforms.fill_open(u)
    uniforms.fill_refined(v)
    u -= 0.5
    offset, acceptance = _candidates(u, mean)
    return offset[v <= acceptance]


def _candidates(
    u: NDArray[np.float64], mean: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return what ``u``, in (-1/2, 1/2), proposes, and the probability of accepting it.

    Proposals are counted from floor(mean): added to a large mean before they are
    rounded down, they would lose digits, and some numbers come too often.
    """
    whole = math.floor(mean)
    b = 0.931 + 2.53 * math.sqrt(mean)
    a = -0.059 + 0.02483 * b
    inverse_alpha = _HAT + 1.1328 / (b - 3.4)
    us = 0.5 - np.abs(u)
    offset = np.floor((2.0 * a / us + b) * u + (mean - whole + 0.43))
    kept = offset >= _LEAST_KEPT - whole
    np.maximum(offset, _LEAST_KEPT - whole, out=offset)
    acceptance = _probability(offset, mean) * (a / us**2 + b) / inverse_alpha
    return offset, acceptance * kept


def _probability(offset: NDArray[np.float64], mean: float) -> NDArray[np.float64]:
    """Return the probability of floor(``mean``) + ``offset``, from 16 up, of a Poisson number.

    In the form of Loader 2000, "Fast and accurate computation of binomial
    probabilities": exp(-D - stirling(k)) / sqrt(2 pi k), where D is mean *
    ((1 + t) log(1 + t) - t) and t = (k - mean) / mean. Its relative error is about
    |k - mean| * 2^-52, where k log(mean) - mean - log k! is wrong by mean * 2^-48.
    """
    whole = math.floor(mean)
    k = offset + whole
    t = (offset - (mean - whole)) / mean
    divergence = mean * ((1.0 + t) * np.log1p(t) - t)
    inverse = 1.0 / k
    stirling = inverse * (1 / 12 - inverse**2 * (1 / 360 - inverse**2 / 1260))
    return np.exp(-divergence - stirling) / np.sqrt(2.0 * math.pi * k)


@lru_cache(maxsize=8)
def _poisson_table(mean: float) -> NDArray[np.uint64]:
    """Return floor(2^64 P(X <= k)) for k = 0, 1, ... of a Poisson number X.

    The number of entries not above a uniform 64-bit word is distributed as X, each
    probability wrong by less than 2^-64. Computed with 60 digits, then cut off.
    """
    exact = Context(prec=60)
    rate = Decimal(mean)
    probability = exact.exp(-rate)
    below = probability
    entries = [int(exact.multiply(below, 2**64))]
    while entries[-1] < 2**64 - 1:
        probability = exact.divide(exact.multiply(probability, rate), len(entries))
        below = exact.add(below, probability)
        entries.append(int(exact.multiply(below, 2**64)))
    return np.array(entries, np.uint64)


def round_to_grid(
    vector: NDArray[np.float32] | NDArray[np.float64], grid: float
) -> NDArray[np.int64]:
    """Return the nearest whole numbers to ``vector / grid``, int64 of the same shape.

    ``grid`` is a power of two, so the quotient is exact in float64 and each coordinate
    moves by at most 1/2. Hence ``norm(rounded) <= norm(vector) / grid + sqrt(d) / 2``,
    and two roundings are at most ``sqrt(d)`` further apart than the quotients.

    Raises ``PrivacyError`` if ``grid`` is no power of two, or a coordinate is NaN or
    above 2^52 grid units.
    """
    _check_grid(grid)
    quotients = vector.astype(np.float64)
    quotients *= 1.0 / grid
    if quotients.size and not float(np.abs(quotients).max()) <= _LARGEST_COORDINATE:
        raise PrivacyError(
            f"a vector holds NaN or a value too large for a grid of {grid}; "
            "clip vectors before they are rounded"
        )
    return np.rint(quotients, out=quotients).astype(np.int64)


def grid_for(clip: float, dimension: int) -> float:
    """Return the largest power of two with which rounding adds at most 1 % to the sensitivity.

    That is grid * sqrt(dimension) <= clip / 100, for vectors of ``dimension`` coordinates
    and an L2 norm of at most ``clip``.

    Raises ``PrivacyError`` unless ``clip`` is finite and above 0 and there is a coordinate.
    """
    _check_bound(clip, dimension)
    return math.ldexp(1.0, math.frexp(clip / (_OVERHEAD * math.sqrt(dimension)))[1] - 1)


def sensitivities(clip: float, dimension: int, grid: float) -> tuple[float, float]:
    """Return (l2, l1): how far a rounded vector moves when one unit comes or goes.

    In units of the grid. *Formal guarantee*: if a unit moves the sum by at most ``clip``
    (L2 norm), ``round_to_grid`` of the sum moves by at most l2 = clip / grid + sqrt(d),
    as both sums are rounded by at most 1/2 in each coordinate. The bound covers vectors
    that are rounded unit by unit before the sum too (sqrt(d) / 2 would do there, and
    not for rounded sums). l1 is the lesser of sqrt(d) * l2 (Cauchy and Schwarz) and
    l2 ** 2, as a whole number is at most its square.

    Raises ``PrivacyError`` for a clip, dimension or grid that ``grid_for`` cannot return.
    """
    _check_bound(clip, dimension)
    _check_grid(grid)
    l2 = clip / grid + math.sqrt(dimension)
    return l2, min(math.sqrt(dimension) * l2, l2 * l2)


def _check_bound(clip: float, dimension: int) -> None:
    if not 1e-30 <= clip <= 1e30 or dimension < 1:
        raise PrivacyError(
            f"vectors of {dimension} coordinates and norm {clip} cannot be put on a grid; "
            "it takes at least one coordinate and a norm of 1e-30 to 1e30"
        )


def _check_grid(grid: float) -> None:
    if not (0.0 < grid < math.inf and math.frexp(grid)[0] == 0.5):
        raise PrivacyError(f"a grid of {grid} does not round exactly; use a power of two")
