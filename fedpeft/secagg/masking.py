"""Masks: ChaCha20 keystreams added to and subtracted from a vector of words.

A mask is the keystream of ChaCha20 (RFC 8439) under a 32-byte seed, read as
little-endian uint32. Both holders of a seed make the same mask, one adds it, the
other subtracts it, and the sum of their vectors is free of it (Bonawitz et al. 2017).

Sums are kept modulo 2^32 and reduced to ``width`` bits once at the end. That is
exact because 2^width divides 2^32: reducing after each addition or only after the
last gives the same words. The low ``width`` bits of a uniform uint32 are uniform, so
the reduced mask hides a reduced word as well as a full one hides a full word.

This module must not know whose seeds these are, nor what the words mean.
"""

from collections.abc import Sequence

import numpy as np

from fedpeft.keystream import CHUNK, KEYSTREAM_WORD, Keystream, Words


class Masks:
    """The masks of one vector, applied to it part by part in order.

    ``add`` and ``subtract`` are seeds of 32 bytes; ``BadVector`` is raised for others.
    """

    def __init__(self, add: Sequence[bytes], subtract: Sequence[bytes]) -> None:
        self._added = [Keystream(seed) for seed in add]
        self._subtracted = [Keystream(seed) for seed in subtract]
        self._mask = np.empty(CHUNK, KEYSTREAM_WORD)

    def apply(self, part: Words) -> None:
        """Mask the next part of the vector, a uint32 array (m,), in place modulo 2^32.

        All masks are applied to one chunk before the next is touched, so that memory is
        passed over once.
        """
        for start in range(0, part.size, CHUNK):
            chunk = part[start : start + CHUNK]
            mask = self._mask[: chunk.size]
            for stream in self._added:
                stream.fill(mask)
                np.add(chunk, mask, out=chunk)
            for stream in self._subtracted:
                stream.fill(mask)
                np.subtract(chunk, mask, out=chunk)


def apply_masks(accumulator: Words, add: Sequence[bytes], subtract: Sequence[bytes]) -> None:
    """Add and subtract masks, each given by its seed, to a uint32 array (n,) in place.

    The words are modulo 2^32 afterwards; see ``reduce_width``.

    Raises ``BadVector`` if a seed is not 32 bytes, before anything was changed.
    """
    Masks(add, subtract).apply(accumulator)


def reduce_width(accumulator: Words, width: int) -> None:
    """Reduce a uint32 array modulo 2^width, width from 1 to 32, in place."""
    np.bitwise_and(accumulator, np.uint32(2**width - 1), out=accumulator)
