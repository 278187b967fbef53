"""Secret draws: uniform numbers, Poisson samples and subsets without bias."""

import math
import os
from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from fedpeft.errors import PrivacyError
from fedpeft.keystream import SEED_BYTES, Keystream
from fedpeft.privacy.noise import GaussianNoise
from fedpeft.privacy.sampling import CHUNK, PoissonSampler, SecretDraws, Uniforms
from fedpeft.privacy.skellam import SkellamNoise


def uniforms_of(byte: int) -> Uniforms:
    return Uniforms(Keystream(bytes([byte]) * SEED_BYTES), reproducible=True)


class FixedWords(Uniforms):
    """Uniforms whose words are given, to reach what chance does not."""

    def __init__(self, *words: int) -> None:
        super().__init__(Keystream(bytes(SEED_BYTES)), reproducible=True)
        self._given = list(words)

    def words(self, size: int):
        given, self._given = self._given[:size], self._given[size:]
        return np.array(given, "<u8")


@pytest.mark.parametrize("fill", ["fill_open", "fill_refined"])
def test_uniforms_are_uniform(fill: str):
    drawn = np.empty(CHUNK)
    getattr(uniforms_of(1), fill)(drawn)
    assert stats.kstest(drawn, "uniform").pvalue > 1e-4


def test_open_uniforms_reach_neither_end_and_are_symmetric():
    drawn = np.empty(2)
    FixedWords(0, 2**64 - 1).fill_open(drawn)
    assert drawn.tolist() == [2.0**-53, 1 - 2.0**-53]


def test_refined_uniforms_are_never_zero_and_fine_near_it():
    drawn = np.empty(5)
    FixedWords(0, 0, 1, 2**52, 2**64 - 1, 0, 2**63, 2**62).fill_refined(drawn)
    expected = [2.0**-128, 2.0**-65, 1.25 * 2.0**-64, 2.0**-12, 1.0]
    assert drawn.tolist() == pytest.approx(expected, rel=1e-15, abs=0)


def test_a_new_key_is_drawn_long_before_the_cipher_stops(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fedpeft.privacy.sampling._WORDS_OF_A_KEY", 100)
    uniforms = uniforms_of(2)
    drawn = np.concatenate([uniforms.words(40).copy() for _ in range(50)])
    plain, following = np.empty(84, "<u8"), np.empty(40, "<u8")
    Keystream(bytes([2]) * SEED_BYTES).fill(plain.view("<u4"))
    Keystream(plain[80:].tobytes()).fill(following.view("<u4"))
    assert drawn[:120].tolist() == [*plain[:80], *following]
    assert np.unique(drawn).size == drawn.size


@pytest.mark.parametrize("draws", [GaussianNoise, SkellamNoise, PoissonSampler])
def test_only_seeded_draws_are_reproducible(draws: type[SecretDraws]):
    assert not draws().reproducible
    assert draws.seeded(1).reproducible


def test_fresh_samplers_differ_and_seeded_ones_repeat():
    assert PoissonSampler().sample(500, 0.5).tolist() != PoissonSampler().sample(500, 0.5).tolist()
    first, second = (PoissonSampler.seeded(3, "a", 1).sample(500, 0.5) for _ in range(2))
    assert first.tolist() == second.tolist()
    others = [(4, "a", 1), (3, "a", 2), (3, "a1"), (3, "a", "1")]
    for seed, *names in others:
        other = PoissonSampler.seeded(int(seed), *names).sample(500, 0.5)
        assert other.tolist() != first.tolist()


def test_a_forked_process_cannot_draw_what_its_parent_draws(monkeypatch: pytest.MonkeyPatch):
    sampler = PoissonSampler()
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(PrivacyError, match="forked process"):
        sampler.sample(10, 0.5)


def test_a_sample_is_ascending_and_without_repetition():
    drawn = PoissonSampler().sample(3 * CHUNK + 5, 0.3)
    assert drawn.dtype == np.int64
    assert np.all(np.diff(drawn) > 0)
    assert drawn[0] >= 0 and drawn[-1] < 3 * CHUNK + 5


def test_each_unit_is_drawn_with_the_rate_and_independently():
    units, draws, rate = 400, 5_000, 0.15
    sampler = PoissonSampler.seeded(5)
    taken = np.zeros((draws, units))
    for row in taken:
        row[sampler.sample(units, rate)] = 1
    spread = math.sqrt(rate * (1 - rate))
    scores = (taken.mean(axis=0) - rate) / spread * math.sqrt(draws)
    assert stats.kstest(scores, "norm").pvalue > 1e-4
    scaled = (taken - rate) / spread
    correlations = (scaled.T @ scaled)[np.triu_indices(units, 1)] / math.sqrt(draws)
    assert np.abs(correlations).max() < 6
    assert correlations.std() == pytest.approx(1, abs=0.02)
    following = float(np.mean(scaled[1:] * scaled[:-1]))
    assert abs(following) < 5 / math.sqrt(taken.size)


def test_sizes_are_binomial_and_not_those_of_shuffled_batches():
    units, rate, draws = 100, 0.1, 4_000
    sampler = PoissonSampler.seeded(6)
    sizes = np.array([sampler.sample(units, rate).size for _ in range(draws)])
    assert np.unique(sizes).size > 10
    variance = units * rate * (1 - rate)
    assert sizes.mean() == pytest.approx(units * rate, abs=5 * math.sqrt(variance / draws))
    assert sizes.var() == pytest.approx(variance, rel=5 * math.sqrt(2 / draws))


def test_an_epoch_of_samples_does_not_visit_each_unit_once():
    sampler = PoissonSampler.seeded(7)
    visits = np.zeros(1_000, np.int64)
    for _ in range(10):
        visits[sampler.sample(1_000, 0.1)] += 1
    expected = stats.binom.pmf([0, 1, 2], 10, 0.1) * 1_000
    assert np.bincount(visits)[:3] == pytest.approx(expected, abs=80)


def test_empty_samples_occur_as_often_as_they_should():
    sampler, draws = PoissonSampler.seeded(8), 4_000
    empty = sum(sampler.sample(20, 0.1).size == 0 for _ in range(draws))
    probability = 0.9**20
    deviation = math.sqrt(draws * probability * (1 - probability))
    assert empty == pytest.approx(draws * probability, abs=5 * deviation)


def test_rate_one_takes_every_unit():
    assert PoissonSampler().sample(CHUNK + 7, 1.0).tolist() == list(range(CHUNK + 7))


def test_the_probability_is_the_rate_rounded_down_to_53_bits():
    sampler = PoissonSampler()
    bound = int(0.1 * 2**53)
    sampler._uniforms = FixedWords(0, (bound - 1) << 11, (bound << 11) - 1, bound << 11, 2**64 - 1)
    assert sampler.sample(5, 0.1).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("units", "rate"), [(0, 0.5), (-1, 0.5), (5, 0.0), (5, -0.1), (5, 1.01), (5, math.nan)]
)
def test_impossible_samples_are_refused(units: int, rate: float):
    with pytest.raises(PrivacyError, match=f"from {units} units with rate {rate}"):
        PoissonSampler().sample(units, rate)


def test_each_subset_is_chosen_equally_often():
    sampler, draws = PoissonSampler.seeded(9), 12_000
    subsets = dict.fromkeys(combinations(range(6), 3), 0)
    for _ in range(draws):
        subsets[tuple(sampler.choose(6, 3).tolist())] += 1
    assert stats.chisquare(list(subsets.values())).pvalue > 1e-4


def test_few_items_are_all_chosen():
    assert PoissonSampler().choose(3, 5).tolist() == [0, 1, 2]
    assert PoissonSampler().choose(5, 5).tolist() == [0, 1, 2, 3, 4]
    assert PoissonSampler().choose(0, 1).tolist() == []


def test_a_choice_of_many_items_has_the_size_asked_for():
    chosen = PoissonSampler().choose(2 * CHUNK + 1, 100)
    assert chosen.size == 100
    assert np.all(np.diff(chosen) > 0)


def test_equal_keys_are_drawn_again():
    sampler = PoissonSampler()
    sampler._uniforms = FixedWords(1, 1, 2, 9, 8, 7)
    assert sampler.choose(3, 1).tolist() == [2]


@pytest.mark.parametrize(("items", "most"), [(-1, 1), (3, 0), (3, -2)])
def test_impossible_choices_are_refused(items: int, most: int):
    with pytest.raises(PrivacyError, match="cannot be chosen"):
        PoissonSampler().choose(items, most)
