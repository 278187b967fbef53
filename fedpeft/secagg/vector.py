"""The layout of the one vector that a clinic sums: coordinates first, then integers.

Integers (example counts, metrics in fixed point, the number of clipped coordinates)
are summed under the same masks as the coordinates, so nothing about one clinic is
seen beside the sum. An integer is cut in limbs of ``bits`` bits, least significant
first, one word each: a limb is as small as a quantised coordinate, so sums of limbs
fit in the same width and carry into nothing.

This module must not know what the integers count, nor how coordinates are rounded.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import BadVector
from fedpeft.secagg.quantise import headroom_width

_INTEGER_BITS = 64


@dataclass(frozen=True)
class Layout:
    """What stands where in a vector that up to ``clinics`` clinics sum.

    ``coordinates`` words come first, then ``limbs`` words for each name in
    ``integers``, in that order. Raises ``BadVector`` if a size is negative, a name
    stands twice, or sums of so many clinics take more than 32 bits.
    """

    coordinates: int
    integers: tuple[str, ...]
    bits: int
    clinics: int

    def __post_init__(self) -> None:
        if self.coordinates < 0:
            raise BadVector(f"a vector cannot have {self.coordinates} coordinates")
        if len(set(self.integers)) != len(self.integers):
            raise BadVector(f"an integer of the vector stands twice: {', '.join(self.integers)}")
        headroom_width(self.bits, self.clinics)

    @property
    def width(self) -> int:
        """Bits of a summed word."""
        return headroom_width(self.bits, self.clinics)

    @property
    def limbs(self) -> int:
        """Words of an integer."""
        return -(-_INTEGER_BITS // self.bits)

    @property
    def words(self) -> int:
        """Words of the whole vector."""
        return self.coordinates + self.limbs * len(self.integers)

    @property
    def largest_integer(self) -> int:
        """What one clinic may send at most: the sum of all then is below 2^63."""
        return (2 ** (_INTEGER_BITS - 1) - 1) // self.clinics

    def encode_integers(self, values: Mapping[str, int]) -> NDArray[np.uint32]:
        """Return the limbs of the integers, uint32 (limbs * len(integers),).

        Raises ``BadVector`` if a name is missing or unknown, or a value is negative or
        above ``largest_integer``.
        """
        if set(values) != set(self.integers):
            raise BadVector(
                f"the integers {', '.join(values)} were given, "
                f"where {', '.join(self.integers)} are summed"
            )
        limbs: list[int] = []
        for name in self.integers:
            value = values[name]
            if not 0 <= value <= self.largest_integer:
                raise BadVector(
                    f"the integer {name} cannot be summed: it must be 0 to {self.largest_integer}"
                )
            limbs += [value >> shift & 2**self.bits - 1 for shift in self._shifts()]
        return np.array(limbs, np.uint32)

    def decode_integers(self, sums: NDArray[np.uint32] | NDArray[np.uint64]) -> dict[str, int]:
        """Return the exact sums of the integers from the sums of their limbs.

        ``sums`` is what follows the coordinates, (limbs * len(integers),).

        Raises ``BadVector`` if it has another length, or holds a sum that ``clinics``
        clinics cannot make: masks are left in it.
        """
        if sums.size != self.limbs * len(self.integers):
            raise BadVector(
                f"{sums.size} words are not the {len(self.integers)} integers of the vector"
            )
        decoded: dict[str, int] = {}
        for name, limbs in zip(self.integers, sums.reshape(-1, self.limbs).tolist(), strict=True):
            total = sum(limb << shift for limb, shift in zip(limbs, self._shifts(), strict=True))
            largest_limb = self.clinics * (2**self.bits - 1)
            if max(limbs) > largest_limb or total > self.clinics * self.largest_integer:
                raise BadVector(
                    f"the sum of the integer {name} is not one of {self.clinics} clinics"
                )
            decoded[name] = total
        return decoded

    def _shifts(self) -> range:
        return range(0, self.limbs * self.bits, self.bits)
