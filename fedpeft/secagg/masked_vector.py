"""A clinic's masked vector: quantised, masked, reduced and packed, block by block.

Each block passes through all four steps while it is in the cache, so no copy of the
whole quantised vector is held, and only one block of it is ever unmasked in memory.

This module must not know who holds the seeds, nor in which round.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import BadVector
from fedpeft.secagg.masking import Masks, reduce_width
from fedpeft.secagg.packing import BLOCK, Packer
from fedpeft.secagg.quantise import Quantiser, Rounding
from fedpeft.secagg.vector import Layout

CLIPPED = "clipped"
"""The integer that counts this clinic's clipped coordinates; only its sum is seen."""


def masked_vector(
    values: NDArray[np.float32],
    weight: int,
    integers: Mapping[str, int],
    quantiser: Quantiser,
    layout: Layout,
    add: Sequence[bytes],
    subtract: Sequence[bytes],
) -> tuple[bytes, int]:
    """Return the packed masked vector and how many coordinates were clipped.

    ``values`` is float32 (layout.coordinates,), before weighting. ``integers`` holds
    all that the layout names but "clipped", which is added here. ``add`` and
    ``subtract`` are the seeds, 32 bytes each, of the masks: this clinic's own and one
    for each peer.

    Raises ``NotFinite`` if a value is NaN or infinite, ``BadVector`` if values,
    integers, weight, quantiser and layout do not fit together, or if there is no mask
    at all, for then the vector would go out in the clear.
    """
    if values.shape != (layout.coordinates,):
        raise BadVector(
            f"an update of {values.size} coordinates was to be masked; "
            f"{layout.coordinates} were agreed"
        )
    if quantiser.bits != layout.bits:
        raise BadVector(f"values of {quantiser.bits} bits do not fit words of {layout.bits} bits")
    if CLIPPED not in layout.integers:
        raise BadVector(f"the layout of the vector has no place for the integer {CLIPPED}")
    if not add and not subtract:
        raise BadVector("a vector without a mask would show the update; it is not sent")
    rounding = Rounding(quantiser, weight)
    masks = Masks(add, subtract)
    packer = Packer(layout.words, layout.width)
    block = np.empty(BLOCK, np.uint32)
    tail: NDArray[np.uint32] | None = None
    clipped = 0
    for start in range(0, layout.words, BLOCK):
        words = block[: min(BLOCK, layout.words - start)]
        part = values[start : start + words.size]
        clipped += rounding.round(part, words[: part.size])
        if part.size < words.size:
            # All coordinates are quantised by now, so the count is complete.
            if tail is None:
                tail = layout.encode_integers({**integers, CLIPPED: clipped})
            first = start + part.size - layout.coordinates
            words[part.size :] = tail[first : first + words.size - part.size]
        masks.apply(words)
        reduce_width(words, layout.width)
        packer.append(words)
    return packer.packed(), clipped
