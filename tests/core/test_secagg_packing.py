"""Packing: every word comes back, and one vector has one packed form."""

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from fedpeft.errors import BadVector
from fedpeft.secagg.packing import BLOCK, Packer, pack, packed_bytes, unpack, unpack_add

WIDTHS = st.integers(1, 32)
LENGTHS = [0, 1, 31, 32, 33, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 777]


@st.composite
def vectors(draw: st.DrawFn) -> tuple[NDArray[np.uint32], int]:
    width = draw(WIDTHS)
    words = draw(
        arrays.arrays(np.uint32, st.integers(0, 200), elements=st.integers(0, 2**width - 1))
    )
    return words, width


def random_words(count: int, width: int, seed: int = 0) -> NDArray[np.uint32]:
    return np.random.default_rng(seed).integers(0, 2**width, count, dtype=np.uint32)


def reference(words: list[int], width: int) -> bytes:
    """The layout as the module's docstring defines it, with one integer for each column."""
    words = words + [0] * (-len(words) % 32)
    g = math.gcd(width, 32)
    packed = b""
    for start in range(0, len(words), 32 * 1024):
        block = words[start : start + 32 * 1024]
        m = g * len(block) // 32
        columns = [sum(block[j * m + c] << (j * width) for j in range(32 // g)) for c in range(m)]
        for row in range(width // g):
            for column in columns:
                packed += (column >> (32 * row) & 0xFFFFFFFF).to_bytes(4, "little")
    return packed


@given(vectors())
def test_unpacking_undoes_packing(vector: tuple[NDArray[np.uint32], int]):
    words, width = vector
    np.testing.assert_array_equal(unpack(pack(words, width), words.size, width), words)


@given(vectors())
def test_the_layout_is_the_documented_one(vector: tuple[NDArray[np.uint32], int]):
    words, width = vector
    assert pack(words, width) == reference(words.tolist(), width)


@pytest.mark.parametrize("width", [1, 20, 23, 32])
def test_the_layout_of_several_blocks_is_the_documented_one(width: int):
    words = random_words(BLOCK + 70, width)
    assert pack(words, width) == reference(words.tolist(), width)


@pytest.mark.parametrize("count", LENGTHS)
@pytest.mark.parametrize("width", range(1, 33))
def test_lengths_around_blocks_come_back(count: int, width: int):
    words = random_words(count, width)
    np.testing.assert_array_equal(unpack(pack(words, width), count, width), words)


@given(count=st.integers(0, 10**7), width=WIDTHS)
def test_the_packed_size_is_the_least_whole_number_of_32_words(count: int, width: int):
    assert packed_bytes(count, width) * 8 == width * 32 * ((count + 31) // 32)


@given(vectors())
def test_the_packed_size_is_as_announced(vector: tuple[NDArray[np.uint32], int]):
    words, width = vector
    assert len(pack(words, width)) == packed_bytes(words.size, width)


@pytest.mark.parametrize("count", LENGTHS)
def test_adding_while_unpacking_equals_unpacking_then_adding(count: int):
    first, second = random_words(count, 32, seed=1), random_words(count, 20, seed=2)
    expected = first + second
    unpack_add(pack(second, 20), first, 20)
    np.testing.assert_array_equal(first, expected)


def test_adding_while_unpacking_takes_no_memory_for_the_whole_vector():
    words = random_words(40 * BLOCK, 20)
    data = pack(words, 20)
    tracemalloc.start()
    unpack_add(data, words, 20)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * 4 * BLOCK


@pytest.mark.parametrize("width", [1, 20, 31])
def test_a_word_above_the_width_is_refused(width: int):
    words = random_words(100, width)
    words[99] = 2**width
    with pytest.raises(BadVector, match=f"{width} bits"):
        pack(words, width)


@settings(max_examples=30)
@given(size=st.integers(0, 2000).filter(lambda size: size != packed_bytes(700, 13)))
def test_data_of_another_length_are_refused(size: int):
    with pytest.raises(BadVector, match="bytes"):
        unpack(bytes(size), 700, 13)


@pytest.mark.parametrize("width", range(1, 33))
def test_any_bit_set_in_the_padding_is_refused(width: int):
    padded = np.zeros(64, np.uint32)
    for place in range(33, 64):
        padded[place] = 1 << (width - 1)
        with pytest.raises(BadVector, match="padding"):
            unpack(pack(padded, width), 33, width)
        padded[place] = 0


def test_bad_padding_is_refused_before_anything_is_added():
    padded = np.ones(BLOCK + 32, np.uint32)
    accumulator = np.zeros(BLOCK + 31, np.uint32)
    with pytest.raises(BadVector, match="padding"):
        unpack_add(pack(padded, 20), accumulator, 20)
    assert not accumulator.any()


@pytest.mark.parametrize("width", [-1, 0, 33])
def test_an_impossible_width_is_refused(width: int):
    with pytest.raises(BadVector, match="width"):
        packed_bytes(10, width)
    with pytest.raises(BadVector, match="width"):
        pack(np.zeros(10, np.uint32), width)


def test_a_negative_number_of_words_is_refused():
    with pytest.raises(BadVector, match="-1 words"):
        unpack(b"", -1, 20)


def test_blocks_of_another_size_than_due_are_refused():
    packer = Packer(BLOCK + 5, 20)
    with pytest.raises(BadVector, match="due"):
        packer.append(np.zeros(5, np.uint32))


def test_a_vector_with_blocks_missing_is_not_handed_out():
    packer = Packer(BLOCK + 5, 20)
    packer.append(np.zeros(BLOCK, np.uint32))
    with pytest.raises(BadVector, match="5 words"):
        packer.packed()
