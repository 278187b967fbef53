"""Shamir's secret sharing of 32-byte seeds and keys (Shamir, "How to share a secret", 1979).

A secret is the value at zero of a random polynomial of degree threshold - 1 over
the integers modulo a prime; a share is its value at a clinic's point. Any
``threshold`` shares determine the secret, fewer say nothing about it.

This module must not know whose secrets it shares, nor how shares travel. It says
nothing of who altered a share: that takes a commitment to the secret, which the
protocol checks. Python's integers do not run in constant time, so secrets are
split only on the machine that owns them.
"""

import math
import secrets
from collections.abc import Mapping, Sequence

from fedpeft.errors import BadShare

PRIME = 2**256 + 297
"""The least prime above 2^256: each 32-byte secret is an element of the field."""

SECRET_BYTES = 32
SHARE_BYTES = 33
LARGEST_POINT = 2**16


def split(secret: bytes, threshold: int, points: Sequence[int]) -> dict[int, bytes]:
    """Share a secret among points, so that any ``threshold`` of the shares restore it.

    Returns, for each point, a share of 33 bytes, big-endian. Coefficients come from
    the operating system's cryptographic generator.

    Raises ``BadShare`` if the secret is not 32 bytes, if the points are not distinct
    integers from 1 to 2^16 (the value at point 0 would be the secret itself), or if
    the threshold is below 1 or above the number of points, which nobody could reach.
    """
    if len(secret) != SECRET_BYTES:
        raise BadShare(f"a secret of {len(secret)} bytes cannot be shared; it must be 32 bytes")
    _check_points(points)
    if not 1 <= threshold <= len(points):
        raise BadShare(
            f"a secret cannot be shared with threshold {threshold} among {len(points)} clinics; "
            "the threshold must be from 1 to their number"
        )
    constant = int.from_bytes(secret, "big")
    coefficients = [constant, *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    return {
        point: evaluate(coefficients, point, PRIME).to_bytes(SHARE_BYTES, "big") for point in points
    }


def combine(shares: Mapping[int, bytes]) -> bytes:
    """Restore the secret, 32 bytes, from exactly as many shares as its threshold.

    Raises what ``Interpolation`` raises. For several secrets that are shared among the
    same points, keep one ``Interpolation``.
    """
    return Interpolation(tuple(shares)).combine(shares)


class Interpolation:
    """Lagrange interpolation at zero from fixed points, computed once for many secrets.

    Raises ``BadShare`` if there are no points, or they are not distinct integers from 1
    to 2^16.
    """

    def __init__(self, points: Sequence[int]) -> None:
        _check_points(points)
        self._coefficients = lagrange_at_zero(points, PRIME)

    def combine(self, shares: Mapping[int, bytes]) -> bytes:
        """Restore one secret, 32 bytes, from its shares at exactly these points.

        Raises ``BadShare`` if the shares are of other points, if a share is not 33 bytes
        or not below the prime, or if the result is no 32-byte secret. Of wrong shares
        this notices only these: they nearly always give some other 32 bytes.
        """
        if shares.keys() != self._coefficients.keys():
            raise BadShare("the shares of a secret are not of the points that were asked for")
        total = sum(
            coefficient * _field_element(point, shares[point])
            for point, coefficient in self._coefficients.items()
        )
        secret = total % PRIME
        if secret >= 2 ** (8 * SECRET_BYTES):
            raise BadShare("the shares do not combine to a secret: at least one of them is wrong")
        return secret.to_bytes(SECRET_BYTES, "big")


def evaluate(coefficients: Sequence[int], point: int, prime: int) -> int:
    """Evaluate a polynomial, constant term first, at a point modulo ``prime`` (Horner)."""
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * point + coefficient) % prime
    return value


def lagrange_at_zero(points: Sequence[int], prime: int) -> dict[int, int]:
    """Return, for each point, what its share is multiplied by to sum to the value at zero."""
    product = math.prod(points) % prime
    weights: dict[int, int] = {}
    for point in points:
        below = point
        for other in points:
            if other != point:
                below = below * (other - point) % prime
        weights[point] = product * pow(below, -1, prime) % prime
    return weights


def _field_element(point: int, share: bytes) -> int:
    value = int.from_bytes(share, "big")
    if len(share) != SHARE_BYTES or value >= PRIME:
        raise BadShare(f"the share of point {point} is malformed: it is no field element")
    return value


def _check_points(points: Sequence[int]) -> None:
    if not points or len(set(points)) != len(points):
        raise BadShare("a secret is shared among at least one point, each named once")
    for point in points:
        if not 1 <= point <= LARGEST_POINT:
            raise BadShare(f"point {point} cannot hold a share; points are 1 to {LARGEST_POINT}")
