"""Gaussian noise for sums of clipped gradients, whose low-order bits tell nothing.

This module must not know what the sums are of, how they were clipped, or what the
noise costs in privacy.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray

from fedpeft.errors import PrivacyError
from fedpeft.privacy.sampling import CHUNK, SecretDraws

_GRID_BITS = 10
"""The grid is 2^-10 to 2^-11 of the scale: it adds less than 1e-7 of the variance."""

_LEAST_SCALE, _LARGEST_SCALE = 1e-30, 1e30
"""Far inside what float32 holds, so that no multiple of the grid is subnormal."""

_LARGEST_VALUE = 2.0**30
"""In units of the scale. A value this large still has 2^-12 of the grid in float64."""


def grid_of(scale: float) -> float:
    """Return the power of two to whose multiples sums with noise of ``scale`` are rounded.

    It is above ``scale * 2^-11`` and at most ``scale * 2^-10``, and public like the scale.

    Raises ``PrivacyError`` unless ``scale`` is 1e-30 to 1e30.
    """
    if not _LEAST_SCALE <= scale <= _LARGEST_SCALE:
        raise PrivacyError(
            f"noise of scale {scale} gives no privacy or cannot be drawn; "
            f"the scale must be {_LEAST_SCALE} to {_LARGEST_SCALE}"
        )
    return math.ldexp(1.0, math.frexp(scale)[1] - 1 - _GRID_BITS)


class GaussianNoise(SecretDraws):
    """Normal noise by Box and Muller (1958) in float64, from a cryptographic stream.

    *Formal guarantee*: ``add_to`` releases round(v + s * z) to a public grid g, and no
    other function of v and z. Were z an exact normal number and v + s * z exact, this
    would be post-processing of the Gaussian mechanism, with its guarantee. It deviates
    in four ways, none of which lets a low-order bit of z through (Mironov 2012, "On
    significance of the least significant bits for differential privacy"):

    - Each multiple of g is reached from every v, since g is at least 2^-11 s while z
      and the sum are wrong by about 2^-48 (z is rounded to float64, its logarithm and
      cosine too). Such an error matters only where it crosses the middle of two grid
      points, and so changes the probability of a result by a factor within
      1 +- 2^-36 or so for |v| up to s; the bound grows with |v| / s. This is an
      estimate, not a proof: over d coordinates it adds an epsilon of about
      2^-36 * 2 sqrt(2 d ln(1 / delta)), or 4e-7 a step for 2.4 million of them.
    - |z| is at most sqrt(2 * 128 ln 2) = 13.3, which an exact normal number passes with
      probability 2e-40. 53-bit uniforms would end at 8.57 with 1e-17, and be coarse
      from 8 on; hence ``fill_refined``.
    - The stream is pseudorandom: all this holds against who cannot break ChaCha20.
    - Time is not constant. A 4096th of the draws takes a longer path, independently of v.

    The cast to float32 is exact for results below 2^24 g, that is 2^13 s; larger ones
    are rounded once more, which is a function of the result alone. What the guarantee
    assumes is that v changes by at most the sensitivity when a unit comes or goes: the
    rounding errors of a float32 sum of gradients are the caller's to bound.
    """

    def __init__(self) -> None:
        super().__init__()
        self._radius = np.empty(CHUNK, np.float64)
        self._angle = np.empty(CHUNK, np.float64)
        self._normals = np.empty(2 * CHUNK, np.float64)

    def draw(self, size: int) -> NDArray[np.float64]:
        """Return independent N(0, 1) numbers, float64 (size,), not rounded to any grid."""
        drawn = np.empty(size, np.float64)
        for start in range(0, size, 2 * CHUNK):
            part = drawn[start : start + 2 * CHUNK]
            part[...] = self._next(part.size)
        return drawn

    def add_to(self, total: torch.Tensor, scale: float) -> None:
        """Add ``scale`` * N(0, 1) to each coordinate in place, then round to ``grid_of(scale)``.

        ``total`` is float32 or float64 of any shape and device; the noise is drawn and
        added in float64 on the CPU. ``scale`` is the standard deviation, in its unit.

        Raises ``PrivacyError``, before anything is written, if the dtype is another, the
        scale is not 1e-30 to 1e30 (0 is no noise), or a value is NaN or larger than
        2^30 scales, where the noise would drown in the rounding.
        """
        grid = grid_of(scale)
        if total.dtype not in (torch.float32, torch.float64):
            raise PrivacyError(
                f"noise cannot be added to a tensor of {total.dtype}; use float32 or float64"
            )
        if not total.numel():
            return
        target = total.detach()
        if not float(target.abs().max()) <= _LARGEST_VALUE * scale:
            raise PrivacyError(
                f"a sum holds NaN or a value too large for noise of scale {scale}; "
                "clip gradients before they are summed"
            )
        host = target.cpu().contiguous()
        self._add(host.numpy().reshape(-1), scale, grid)
        if host.data_ptr() != target.data_ptr():
            target.copy_(host)

    def _add(
        self, values: NDArray[np.float32] | NDArray[np.float64], scale: float, grid: float
    ) -> None:
        for start in range(0, values.size, 2 * CHUNK):
            part = values[start : start + 2 * CHUNK]
            noisy = self._next(part.size)
            noisy *= scale
            noisy += part
            # The grid is a power of two, so only the rounding between rounds.
            noisy *= 1.0 / grid
            np.rint(noisy, out=noisy)
            # A negative zero would tell on which side of zero the sum was.
            noisy += 0.0
            noisy *= grid
            np.copyto(part, noisy, casting="same_kind")

    def _next(self, size: int) -> NDArray[np.float64]:
        """Return the next normals, at most twice ``CHUNK``, valid until the next call."""
        pairs = (size + 1) // 2
        radius, angle = self._radius[:pairs], self._angle[:pairs]
        normals = self._normals[: 2 * pairs]
        self._uniforms.fill_refined(radius)
        np.log(radius, out=radius)
        radius *= -2.0
        np.sqrt(radius, out=radius)
        self._uniforms.fill_open(angle)
        angle *= 2.0 * math.pi
        # Four times as fast as numpy's, and within one unit of the last place.
        torch.cos(torch.from_numpy(angle), out=torch.from_numpy(normals[:pairs]))
        torch.sin(torch.from_numpy(angle), out=torch.from_numpy(normals[pairs:]))
        normals[:pairs] *= radius
        normals[pairs:] *= radius
        return normals[:size]
