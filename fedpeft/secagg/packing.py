"""Planar packing: words of ``width`` bits, held in uint32 arrays, to bytes and back.

On the wire a word takes ``width`` bits, not 32. The layout is chosen so that every
step works on a contiguous row of many words at once:

- The vector is padded with zeros to a multiple of 32 words.
- It is cut in blocks of ``BLOCK`` = 32 * 1024 words; the last block may be shorter,
  yet is a multiple of 32 words.
- With g = gcd(width, 32), a block of B words is read as 32 / g planes of
  m = g * B / 32 words: plane j holds the words j * m to (j + 1) * m - 1 of the block.
- It becomes width / g rows of m uint32, little-endian, row after row. In each of the
  m columns the bits of the rows form one string of width * 32 / g bits, row 0 first,
  least significant bit first. The word of plane j has the bits j * width to
  (j + 1) * width - 1 of it: it starts in row (j * width) // 32 at bit
  (j * width) % 32, and what does not fit there goes on in the next row from bit 0.
  (32 / g is the least number of words that end with a row.)

Blocks follow each other without headers. A vector of ``count`` words therefore takes
``4 * width * ceil(count / 32)`` bytes, and no other byte string decodes to it.

This module must not know what the words mean.
"""

import io
import math
from collections.abc import Callable
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import BadVector

ALIGNMENT = 32
"""Words that a vector is padded to a multiple of: with any width they fill whole rows."""

BLOCK: Final = ALIGNMENT * 1024
"""Words of a block, 128 KiB before packing. Part of the layout."""

WORD: Final = np.dtype("<u4")

Words: TypeAlias = NDArray[np.uint32]


def packed_bytes(count: int, width: int) -> int:
    """Return the number of bytes that ``count`` words of ``width`` bits pack to.

    Raises ``BadVector`` if the width is not 1 to 32 or the count is negative.
    """
    _check_width(width)
    if count < 0:
        raise BadVector(f"a vector cannot have {count} words")
    return 4 * width * -(-count // ALIGNMENT)


def pack(words: Words, width: int) -> bytes:
    """Pack words, a uint32 array (count,), to ``packed_bytes(count, width)`` bytes.

    Raises ``BadVector`` if a word has bits above the width, for they would be lost.
    """
    packer = Packer(words.size, width)
    for start in range(0, words.size, BLOCK):
        packer.append(words[start : start + BLOCK])
    return packer.packed()


class Packer:
    """Packs a vector of ``count`` words block by block, as each block is made.

    Raises ``BadVector`` if the width is not 1 to 32.
    """

    def __init__(self, count: int, width: int) -> None:
        _check_width(width)
        self._width = width
        self._missing = count
        # Hands its bytes out without a copy, where an array would have to be copied.
        self._packed = io.BytesIO()
        self._rows = np.empty(width * BLOCK // ALIGNMENT, WORD)
        self._spare = np.empty(BLOCK, np.uint32)

    def append(self, words: Words) -> None:
        """Pack the next block: ``BLOCK`` words, or all that are left if they are fewer.

        Raises ``BadVector`` if the block has another length, or a word has bits above
        the width.
        """
        if words.size != min(BLOCK, self._missing):
            raise BadVector(
                f"a block of {words.size} words was to be packed; "
                f"{min(BLOCK, self._missing)} were due"
            )
        if words.size and int(words.max()) >> self._width:
            raise BadVector(f"a word of the vector does not fit in {self._width} bits")
        self._missing -= words.size
        padded = _padded(words)
        rows = self._rows[: padded.size // ALIGNMENT * self._width]
        _pack_block(padded, rows, self._spare, self._width)
        self._packed.write(rows.data)

    def packed(self) -> bytes:
        """Return the bytes. Raises ``BadVector`` if blocks are missing."""
        if self._missing:
            raise BadVector(f"{self._missing} words of the vector were not packed")
        return self._packed.getvalue()


def unpack(data: bytes | memoryview, count: int, width: int) -> Words:
    """Restore ``count`` words of ``width`` bits, a uint32 array (count,).

    Raises ``BadVector`` if the data have another length than such a vector packs to,
    or their padding is not zero.
    """
    rows = _rows(data, count, width)
    words = np.empty(count, np.uint32)
    _for_each_block(rows, words, width, np.copyto)
    return words


def unpack_add(data: bytes | memoryview, accumulator: Words, width: int) -> None:
    """Add packed words to a uint32 array (count,) in place, modulo 2^32.

    No more than one block is unpacked at a time, so a server that folds a hundred
    vectors holds one packed vector and the accumulator.

    Raises ``BadVector`` as ``unpack``, before anything was added.
    """
    _for_each_block(_rows(data, accumulator.size, width), accumulator, width, _add)


def _add(accumulator: Words, words: Words) -> None:
    np.add(accumulator, words, out=accumulator)


def _for_each_block(
    rows: Words, words: Words, width: int, use: Callable[[Words, Words], None]
) -> None:
    """Unpack block by block and hand each, with its place in ``words``, to ``use``."""
    block = np.empty(BLOCK, np.uint32)
    spare = np.empty(BLOCK, np.uint32)
    for start in range(0, words.size, BLOCK):
        place = words[start : start + BLOCK]
        first = start // ALIGNMENT * width
        unpacked = block[: -(-place.size // ALIGNMENT) * ALIGNMENT]
        last = first + unpacked.size // ALIGNMENT * width
        _unpack_block(rows[first:last], unpacked, spare, width)
        use(place, unpacked[: place.size])


def _pack_block(block: Words, rows: Words, spare: Words, width: int) -> None:
    planes, rows, shifted = _shaped(block, rows, spare, width)
    for number, plane in enumerate(planes):
        row, shift = divmod(number * width, 32)
        if shift:
            np.left_shift(plane, shift, out=shifted)
            np.bitwise_or(rows[row], shifted, out=rows[row])
        else:
            rows[row] = plane
        if shift + width > 32:
            np.right_shift(plane, 32 - shift, out=rows[row + 1])


def _unpack_block(rows: Words, block: Words, spare: Words, width: int) -> None:
    mask = np.uint32(2**width - 1)
    planes, rows, shifted = _shaped(block, rows, spare, width)
    for number, plane in enumerate(planes):
        row, shift = divmod(number * width, 32)
        np.right_shift(rows[row], shift, out=plane)
        if shift + width > 32:
            np.left_shift(rows[row + 1], 32 - shift, out=shifted)
            np.bitwise_or(plane, shifted, out=plane)
        np.bitwise_and(plane, mask, out=plane)


def _shaped(block: Words, rows: Words, spare: Words, width: int) -> tuple[Words, Words, Words]:
    """View a block as planes, its packed form as rows, and spare room as one more plane."""
    common = math.gcd(width, ALIGNMENT)
    columns = common * block.size // ALIGNMENT
    return block.reshape(-1, columns), rows.reshape(-1, columns), spare[:columns]


def _rows(data: bytes | memoryview, count: int, width: int) -> Words:
    wanted = packed_bytes(count, width)
    if len(data) != wanted:
        raise BadVector(
            f"a packed vector has {len(data)} bytes; {count} words of {width} bits take {wanted}"
        )
    rows = np.frombuffer(data, WORD)
    _check_padding(rows, count, width)
    return rows


def _check_padding(rows: Words, count: int, width: int) -> None:
    """Unpack the last block by itself, so that bad padding is known before any word is used."""
    start = count // BLOCK * BLOCK
    left = count - start
    if left % ALIGNMENT == 0:
        return
    last = np.empty(-(-left // ALIGNMENT) * ALIGNMENT, np.uint32)
    _unpack_block(rows[start // ALIGNMENT * width :], last, np.empty_like(last), width)
    if last[left:].any():
        raise BadVector("the padding of a packed vector is not zero")


def _padded(words: Words) -> Words:
    missing = -words.size % ALIGNMENT
    return np.pad(words, (0, missing)) if missing else words


def _check_width(width: int) -> None:
    if not 1 <= width <= 32:
        raise BadVector(f"words of {width} bits cannot be packed; the width must be 1 to 32")
