"""The summed vector: integers add up exactly, and the masked vector is the sum of its parts."""

import secrets

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedpeft.errors import BadVector, NotFinite
from fedpeft.secagg.masked_vector import masked_vector
from fedpeft.secagg.masking import apply_masks, reduce_width
from fedpeft.secagg.packing import BLOCK, unpack, unpack_add
from fedpeft.secagg.quantise import Quantiser
from fedpeft.secagg.vector import Layout

NAMES: tuple[str, ...] = ("weight", "steps", "clipped")


def layout(coordinates: int = 10, clinics: int = 3, bits: int = 16) -> Layout:
    return Layout(coordinates, NAMES, bits, clinics)


@given(clinics=st.integers(3, 20), bits=st.integers(2, 24), data=st.data())
def test_sums_of_encoded_integers_decode_to_the_sums(clinics: int, bits: int, data: st.DataObject):
    agreed = layout(clinics=clinics, bits=bits)
    value = st.integers(0, agreed.largest_integer)
    sent = [{name: data.draw(value) for name in NAMES} for _ in range(clinics)]
    sums = np.zeros(agreed.limbs * len(NAMES), np.uint32)
    for values in sent:
        sums += agreed.encode_integers(values)
        reduce_width(sums, agreed.width)
    expected = {name: sum(values[name] for values in sent) for name in NAMES}
    assert agreed.decode_integers(sums) == expected


@pytest.mark.parametrize("clinics", [3, 20, 100])
def test_the_largest_integers_of_all_clinics_add_up(clinics: int):
    agreed = layout(clinics=clinics)
    largest = dict.fromkeys(NAMES, agreed.largest_integer)
    sums = agreed.encode_integers(largest) * np.uint32(clinics)
    expected = dict.fromkeys(NAMES, clinics * agreed.largest_integer)
    assert agreed.decode_integers(sums) == expected
    assert clinics * agreed.largest_integer < 2**63


@pytest.mark.parametrize(("bits", "limbs"), [(2, 32), (15, 5), (16, 4), (17, 4), (24, 3)])
def test_an_integer_takes_as_many_words_as_64_bits_need(bits: int, limbs: int):
    assert layout(bits=bits).limbs == limbs
    assert layout(coordinates=7, bits=bits).words == 7 + 3 * limbs


def test_no_limb_is_larger_than_a_quantised_word():
    agreed = layout(bits=5)
    limbs = agreed.encode_integers(dict.fromkeys(NAMES, agreed.largest_integer))
    assert limbs.max() < 2**5


@pytest.mark.parametrize("value", [-1, (2**63 - 1) // 3 + 1, 2**64])
def test_an_integer_out_of_range_is_refused(value: int):
    with pytest.raises(BadVector, match="steps"):
        layout().encode_integers({"weight": 1, "steps": value, "clipped": 0})


@pytest.mark.parametrize(
    "values", [{}, {"weight": 1, "steps": 1}, dict.fromkeys((*NAMES, "loss"), 1)]
)
def test_other_integers_than_agreed_are_refused(values: dict[str, int]):
    with pytest.raises(BadVector, match="integers"):
        layout().encode_integers(values)


@pytest.mark.parametrize("size", [0, 11, 13])
def test_sums_of_another_length_are_refused(size: int):
    with pytest.raises(BadVector, match="words"):
        layout().decode_integers(np.zeros(size, np.uint32))


@pytest.mark.parametrize("limb", [0, 3])
def test_integers_with_masks_left_in_them_are_refused(limb: int):
    agreed = layout()
    sums = agreed.encode_integers(dict.fromkeys(NAMES, 5))
    sums[limb] = 3 * (2**16 - 1) + 1 if limb == 0 else 3 * (2**16 - 1)
    with pytest.raises(BadVector, match="weight"):
        agreed.decode_integers(sums)


def test_a_layout_of_sums_that_do_not_fit_is_refused():
    with pytest.raises(BadVector, match="32"):
        Layout(10, (), 24, 1000)


def test_a_layout_with_a_name_twice_is_refused():
    with pytest.raises(BadVector, match="twice"):
        Layout(10, ("weight", "weight"), 16, 3)


def test_a_layout_of_negative_size_is_refused():
    with pytest.raises(BadVector, match="-1"):
        Layout(-1, (), 16, 3)


QUANTISER = Quantiser(16, 1.0)


def masked(
    values: NDArray[np.float32], agreed: Layout, add: list[bytes], subtract: list[bytes]
) -> tuple[bytes, int]:
    integers = {"weight": 2, "steps": 30}
    return masked_vector(values, 2, integers, QUANTISER, agreed, add, subtract)


# Lengths where the integers fill up a block, cross into the next, or are a block of their own.
@pytest.mark.parametrize("coordinates", [0, 1, 500, BLOCK - 12, BLOCK - 5, BLOCK, 2 * BLOCK + 3])
def test_masked_vectors_sum_to_the_coordinates_and_the_integers(coordinates: int):
    agreed = layout(coordinates)
    pairs = {(i, j): secrets.token_bytes(32) for i in range(3) for j in range(i)}
    own = [secrets.token_bytes(32) for _ in range(3)]
    values = np.random.default_rng(3).uniform(-0.6, 0.6, (3, coordinates)).astype(np.float32)
    sums, clipped = np.zeros(agreed.words, np.uint32), 0
    for clinic in range(3):
        add = [own[clinic], *(seed for (i, _), seed in pairs.items() if i == clinic)]
        subtract = [seed for (_, j), seed in pairs.items() if j == clinic]
        data, count = masked(values[clinic], agreed, add, subtract)
        unpack_add(data, sums, agreed.width)
        clipped += count
    apply_masks(sums, [], own)
    reduce_width(sums, agreed.width)
    restored = QUANTISER.dequantise(sums[:coordinates], 3)
    expected = np.clip(2 * values.astype(np.float64), -1, 1).sum(axis=0)
    np.testing.assert_allclose(restored, expected, atol=3 * QUANTISER.step)
    assert clipped == np.count_nonzero(np.abs(2 * values) > 1)
    expected = {"weight": 6, "steps": 90, "clipped": clipped}
    assert agreed.decode_integers(sums[coordinates:]) == expected


def test_a_masked_vector_shows_nothing_of_its_values():
    agreed, seed = layout(2**18), secrets.token_bytes(32)
    data, _ = masked(np.zeros(2**18, np.float32), agreed, [seed], [])
    words = unpack(data, agreed.words, agreed.width)
    counts = np.bincount(words >> (agreed.width - 6), minlength=64)
    mean = agreed.words / 64
    # chi-squared with 63 degrees of freedom: mean 63, standard deviation 11.2
    assert ((counts - mean) ** 2 / mean).sum() < 63 + 6 * 11.2


def test_a_vector_without_any_mask_is_never_made():
    with pytest.raises(BadVector, match="mask"):
        masked(np.zeros(10, np.float32), layout(), [], [])


def test_values_of_another_number_than_agreed_are_refused():
    with pytest.raises(BadVector, match="11 coordinates"):
        masked(np.zeros(11, np.float32), layout(), [bytes(32)], [])


def test_a_quantiser_of_other_bits_than_the_layout_is_refused():
    with pytest.raises(BadVector, match="15 bits"):
        masked(np.zeros(10, np.float32), layout(bits=15), [bytes(32)], [])


def test_a_layout_without_a_place_for_the_clipped_count_is_refused():
    with pytest.raises(BadVector, match="clipped"):
        masked(np.zeros(10, np.float32), Layout(10, ("weight", "steps"), 16, 3), [bytes(32)], [])


def test_a_value_that_is_not_finite_gives_no_vector():
    values = np.zeros(2 * BLOCK, np.float32)
    values[-1] = np.nan
    with pytest.raises(NotFinite):
        masked(values, layout(2 * BLOCK), [bytes(32)], [])


@settings(max_examples=20)
@given(count=st.integers(0, 1000))
def test_what_was_clipped_is_reported(count: int):
    values = np.zeros(1000, np.float32)
    values[:count] = 0.51
    assert masked(values, layout(1000), [bytes(32)], [])[1] == count
