"""Masks: the streams are those of RFC 8439, and what is added can be subtracted exactly."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedpeft.errors import BadVector
from fedpeft.keystream import CHUNK, KEYSTREAM_WORD, Keystream
from fedpeft.secagg.masking import apply_masks, reduce_width

LENGTHS = [0, 1, 15, 16, 17, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5]
SEEDS = [bytes([number]) * 32 for number in range(6)]

# RFC 8439, appendix A.1, test vectors 1 and 2: zero key and nonce, counters 0 and 1.
RFC_8439_BLOCKS_0_AND_1 = bytes.fromhex(
    "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
    "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586"
    "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
    "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f"
)


def stream(seed: bytes, count: int) -> NDArray[np.uint32]:
    words = np.empty(count, KEYSTREAM_WORD)
    Keystream(seed).fill(words)
    return words


def test_the_stream_is_that_of_rfc_8439():
    expected = np.frombuffer(RFC_8439_BLOCKS_0_AND_1, "<u4")
    np.testing.assert_array_equal(stream(bytes(32), 32), expected)


def test_every_bit_of_the_seed_changes_the_stream():
    streams = {stream(bytes(32), 8).tobytes()}
    for bit in range(256):
        streams.add(stream((1 << bit).to_bytes(32, "big"), 8).tobytes())
    assert len(streams) == 257


def test_the_low_bits_of_a_stream_are_uniform():
    words = stream(SEEDS[1], 2**18) & np.uint32(2**20 - 1)
    counts = np.bincount(words >> 14, minlength=64)
    # chi-squared with 63 degrees of freedom: mean 63, standard deviation 11.2
    assert ((counts - 4096.0) ** 2 / 4096).sum() < 63 + 6 * 11.2


@pytest.mark.parametrize("count", LENGTHS)
def test_a_stream_does_not_depend_on_how_it_is_cut(count: int):
    whole = stream(SEEDS[1], count)
    keystream, parts = Keystream(SEEDS[1]), np.empty(count, KEYSTREAM_WORD)
    for start in range(0, count, 1009):
        keystream.fill(parts[start : start + 1009])
    np.testing.assert_array_equal(parts, whole)


def test_fresh_streams_differ():
    first, second = np.empty(8, KEYSTREAM_WORD), np.empty(8, KEYSTREAM_WORD)
    Keystream.fresh().fill(first)
    Keystream.fresh().fill(second)
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("count", LENGTHS)
def test_masks_are_the_sum_of_their_streams(count: int):
    accumulator = np.full(count, 7, np.uint32)
    apply_masks(accumulator, SEEDS[:2], SEEDS[2:3])
    expected = 7 + stream(SEEDS[0], count) + stream(SEEDS[1], count) - stream(SEEDS[2], count)
    np.testing.assert_array_equal(accumulator, expected)


@given(
    count=st.integers(0, 200),
    add=st.lists(st.binary(min_size=32, max_size=32), max_size=4),
    subtract=st.lists(st.binary(min_size=32, max_size=32), max_size=4),
)
def test_masks_that_are_added_then_subtracted_leave_nothing(
    count: int, add: list[bytes], subtract: list[bytes]
):
    accumulator = np.arange(count, dtype=np.uint32)
    apply_masks(accumulator, add, subtract)
    apply_masks(accumulator, subtract, add)
    np.testing.assert_array_equal(accumulator, np.arange(count, dtype=np.uint32))


@given(width=st.integers(1, 32), words=st.lists(st.integers(0, 2**32 - 1), min_size=1))
def test_reducing_keeps_the_residue_modulo_two_to_the_width(width: int, words: list[int]):
    accumulator = np.array(words, np.uint32)
    reduce_width(accumulator, width)
    assert accumulator.tolist() == [word % 2**width for word in words]


def test_reducing_once_at_the_end_equals_reducing_after_every_mask():
    once, often = np.arange(100, dtype=np.uint32), np.arange(100, dtype=np.uint32)
    apply_masks(once, SEEDS[:3], SEEDS[3:])
    reduce_width(once, 20)
    for add, subtract in [(SEEDS[:1], []), (SEEDS[1:3], []), ([], SEEDS[3:])]:
        apply_masks(often, add, subtract)
        reduce_width(often, 20)
    np.testing.assert_array_equal(once, often)


@pytest.mark.parametrize("size", [0, 16, 31, 33])
def test_a_seed_of_another_length_is_refused_before_anything_is_masked(size: int):
    accumulator = np.zeros(10, np.uint32)
    with pytest.raises(BadVector, match="seed"):
        apply_masks(accumulator, SEEDS[:1], [bytes(size)])
    assert not accumulator.any()
