"""Quantising: unbiased, at most one level wrong for each clinic, exact at zero."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from fedpeft.errors import BadVector, NotFinite
from fedpeft.secagg.quantise import Quantiser, headroom_width

MANY = 400_000
LIMITS = st.floats(1e-6, 1e6)
BITS = st.integers(2, 24)


def words_of(
    quantiser: Quantiser, values: NDArray[np.float32], weight: int = 1
) -> NDArray[np.uint32]:
    words = np.empty(values.shape, np.uint32)
    quantiser.quantise(values, weight, words)
    return words


@pytest.mark.parametrize("bits", [2, 8, 16, 24])
@pytest.mark.parametrize("share", [-0.9999, -0.5, -1e-3, 1e-4, 0.123, 0.7, 0.9999])
def test_rounding_is_unbiased(bits: int, share: float):
    quantiser = Quantiser(bits, 2.0)
    value = np.float32(2.0 * share)
    levels = words_of(quantiser, np.full(MANY, value)) - float(quantiser.centre)
    expected = float(value) / quantiser.step
    # one rounding has a standard deviation of at most half a level
    assert abs(levels.mean() - expected) < 6 * 0.5 / math.sqrt(MANY)


def test_each_of_many_different_values_is_unbiased_together():
    quantiser = Quantiser(16, 1.0)
    values = np.linspace(-1, 1, MANY, dtype=np.float32)
    errors = quantiser.dequantise(words_of(quantiser, values), 1) - values
    assert abs(errors.mean()) < 6 * 0.5 * quantiser.step / math.sqrt(MANY)


def test_two_roundings_of_one_vector_differ():
    quantiser, values = Quantiser(8, 1.0), np.full(1000, 0.1234, np.float32)
    assert not np.array_equal(words_of(quantiser, values), words_of(quantiser, values))


@given(
    bits=BITS,
    limit=LIMITS,
    weight=st.integers(1, 10_000),
    shares=arrays.arrays(np.float64, st.integers(1, 50), elements=st.floats(-1, 1)),
)
def test_a_value_is_at_most_one_step_wrong(
    bits: int, limit: float, weight: int, shares: NDArray[np.float64]
):
    quantiser = Quantiser(bits, limit)
    values = (shares * limit / weight).astype(np.float32)
    restored = quantiser.dequantise(words_of(quantiser, values, weight), 1)
    wanted = np.clip(values.astype(np.float64) * weight, -limit, limit)
    assert np.abs(restored - wanted).max() <= quantiser.step * (1 + 1e-9)


@pytest.mark.parametrize("clinics", [3, 10, 100])
def test_a_sum_is_at_most_one_step_a_clinic_wrong(clinics: int):
    quantiser = Quantiser(16, 3.0)
    values = np.random.default_rng(1).uniform(-3, 3, (clinics, 500)).astype(np.float32)
    sums = sum(words_of(quantiser, row).astype(np.uint64) for row in values)
    assert isinstance(sums, np.ndarray)
    errors = quantiser.dequantise(sums, clinics) - values.sum(axis=0, dtype=np.float64)
    assert np.abs(errors).max() <= clinics * quantiser.step


@given(bits=BITS, limit=LIMITS, weight=st.integers(1, 2**53))
def test_zero_is_exact_whatever_the_noise(bits: int, limit: float, weight: int):
    quantiser = Quantiser(bits, limit)
    words = words_of(quantiser, np.zeros(2000, np.float32), weight)
    assert (words == quantiser.centre).all()
    assert not quantiser.dequantise(words, 1).any()


@pytest.mark.parametrize("bits", [2, 16, 24])
def test_the_limits_are_the_first_and_the_last_level(bits: int):
    quantiser = Quantiser(bits, 0.1)
    limits = np.repeat(np.array([-1e9, 1e9], np.float32), 50_000)
    words = words_of(quantiser, limits)
    assert set(words[:50_000].tolist()) == {0}
    assert set(words[50_000:].tolist()) == {2 * quantiser.centre}


@given(
    bits=BITS,
    limit=LIMITS,
    values=arrays.arrays(np.float32, st.integers(0, 50), elements=st.floats(-1e6, 1e6, width=32)),
    weight=st.integers(1, 2**53),
)
def test_words_stay_in_range(bits: int, limit: float, values: NDArray[np.float32], weight: int):
    quantiser = Quantiser(bits, limit)
    assert all(word <= 2 * quantiser.centre for word in words_of(quantiser, values, weight))


def test_clipped_coordinates_are_counted():
    values = np.array([0.4, -0.6, 0.6, 0.5, -0.5, 0.0], np.float32)
    words = np.empty(6, np.uint32)
    assert Quantiser(16, 1.0).quantise(values, 2, words) == 2


def test_clipped_coordinates_are_counted_over_all_chunks():
    values = np.full(200_000, 0.1, np.float32)
    values[::1000] = -7
    assert Quantiser(16, 1.0).quantise(values, 1, np.empty(200_000, np.uint32)) == 200


def test_weights_scale_before_clipping():
    quantiser = Quantiser(16, 100.0)
    words = words_of(quantiser, np.array([0.25, -0.25, 9.0], np.float32), weight=300)
    restored = quantiser.dequantise(words, 1)
    np.testing.assert_allclose(restored, [75, -75, 100], atol=quantiser.step)


@given(bits=BITS, clinics=st.integers(1, 100), data=st.data())
def test_restored_sums_are_those_of_integer_arithmetic(
    bits: int, clinics: int, data: st.DataObject
):
    quantiser = Quantiser(bits, 1.5)
    word = st.integers(0, 2 * quantiser.centre)
    words = data.draw(st.lists(word, min_size=clinics, max_size=clinics))
    restored = quantiser.dequantise(np.array([sum(words)], np.uint64), clinics)
    assert restored.tolist() == [(sum(words) - clinics * quantiser.centre) * quantiser.step]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 70_000, 99_999])
def test_a_value_that_is_not_finite_is_refused_before_anything_is_written(bad: float, place: int):
    values, words = np.zeros(100_000, np.float32), np.zeros(100_000, np.uint32)
    values[place] = bad
    with pytest.raises(NotFinite):
        Quantiser(16, 1.0).quantise(values, 1, words)
    assert not words.any()


@pytest.mark.parametrize("weight", [0, -1, 2**53 + 1])
def test_an_impossible_weight_is_refused_before_anything_is_written(weight: int):
    words = np.zeros(10, np.uint32)
    with pytest.raises(BadVector, match="weight"):
        Quantiser(16, 1.0).quantise(np.ones(10, np.float32), weight, words)
    assert not words.any()


def test_words_of_another_length_are_refused():
    with pytest.raises(BadVector, match="11 words"):
        Quantiser(16, 1.0).quantise(np.ones(10, np.float32), 1, np.empty(11, np.uint32))


def test_a_sum_with_masks_left_in_it_is_refused():
    quantiser = Quantiser(16, 1.0)
    sums = np.array([0, 2 * quantiser.centre * 3 + 1], np.uint32)
    with pytest.raises(BadVector, match="masks"):
        quantiser.dequantise(sums, 3)


@pytest.mark.parametrize("bits", [-1, 0, 1, 25])
def test_impossible_bits_are_refused(bits: int):
    with pytest.raises(BadVector, match="bits"):
        Quantiser(bits, 1.0)


@pytest.mark.parametrize("limit", [0.0, -1.0, 1e-300, 1e300, math.nan, math.inf])
def test_an_impossible_range_is_refused(limit: float):
    with pytest.raises(BadVector, match="range"):
        Quantiser(16, limit)


@pytest.mark.parametrize(("bits", "clinics", "width"), [(16, 10, 20), (16, 100, 23), (16, 1, 16)])
def test_the_width_has_room_for_the_sum(bits: int, clinics: int, width: int):
    assert headroom_width(bits, clinics) == width


@given(bits=st.integers(1, 24), clinics=st.integers(1, 256))
def test_the_width_is_the_least_that_holds_the_largest_sum(bits: int, clinics: int):
    width = headroom_width(bits, clinics)
    largest = clinics * (2**bits - 1)
    assert 2 ** (width - 1) <= largest < 2**width


@pytest.mark.parametrize(("bits", "clinics"), [(24, 257), (32, 2), (0, 3), (16, 0)])
def test_sums_that_do_not_fit_in_a_word_are_refused(bits: int, clinics: int):
    with pytest.raises(BadVector):
        headroom_width(bits, clinics)
