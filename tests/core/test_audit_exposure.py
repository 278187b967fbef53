"""Exposure of planted ranks, and of the tail against the true one."""

import math
from statistics import NormalDist

import numpy as np
import pytest

from fedpeft.audit.exposure import exposure

SAMPLE = np.random.default_rng(0).normal(20.0, 2.0, size=4000)


@pytest.mark.parametrize("rank", [1, 7, 128, 255])
def test_a_planted_rank_is_found_again(rank: int):
    others = np.arange(1.0, 256.0)
    assert exposure(rank + 0.5, others, bits=26.0) == pytest.approx(8 - math.log2(rank + 1))


def test_ties_count_against_the_canary():
    assert exposure(1.0, np.ones(255), bits=26.0) == 0.0


@pytest.mark.parametrize("deviations", [4.0, 5.0, 6.0])
def test_beyond_the_sample_the_tail_is_read_off(deviations: float):
    truth = -math.log2(NormalDist().cdf(-deviations))
    assert exposure(20.0 - 2 * deviations, SAMPLE, bits=64.0) == pytest.approx(truth, rel=0.12)


def test_no_secret_has_more_bits_than_it_has():
    assert exposure(-500.0, SAMPLE, bits=26.6) == 26.6
    assert exposure(-500.0, np.ones(255), bits=26.6) == 8.0


def test_chance_gives_one_and_a_half_bits():
    draw = np.random.default_rng(1)
    found = [exposure(draw.normal(), draw.normal(size=256), bits=26.6) for _ in range(2000)]
    assert np.mean(found) == pytest.approx(1 / math.log(2), abs=0.1)
