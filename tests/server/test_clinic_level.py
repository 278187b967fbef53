"""Noise over whole clinics: how much one clinic can do, how much noise hides it, what it costs."""

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.adapters import AdapterSchema, AdapterState, TensorSpec, WeightedMean
from fedpeft.privacy.accounting import epsilon_of
from fedpeft.privacy.calibration import calibrated
from fedpeft.privacy.charge import Charge
from fedpeft.privacy.noise import GaussianNoise
from fedpeft_server.rounds.clinic_level import ClinicLevel, multiplier_for

SIZE = 20_000
SCHEMA = AdapterSchema((TensorSpec("m.lora_A.weight", (4, SIZE // 4)),), "a" * 64)
SMALL = AdapterSchema((TensorSpec("m.lora_A.weight", (2, 4)),), "a" * 64)
ZERO = AdapterState(SCHEMA, torch.zeros(SIZE))


def level(multiplier: float = 1.0, *, target: float = 0.5, seed: int = 3) -> ClinicLevel:
    return ClinicLevel(multiplier, target, GaussianNoise.seeded(seed))


def mean_of(updates: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    mean = WeightedMean(SMALL)
    for values, weight in zip(updates, weights, strict=True):
        mean.add(AdapterState(SMALL, values), weight)
    return mean.result().values.double()


@given(
    weights=st.lists(st.integers(1, 5000), min_size=1, max_size=12),
    clip=st.floats(1e-3, 1e3),
    seed=st.integers(0, 2**16),
    data=st.data(),
)
def test_taking_a_clinic_out_never_moves_the_mean_by_more_than_the_sensitivity(
    weights: list[int], clip: float, seed: int, data: st.DataObject
):
    generator = torch.Generator().manual_seed(seed)
    directions = [torch.randn(8, generator=generator) for _ in weights]
    updates = [clip * values / torch.linalg.vector_norm(values) for values in directions]
    gone = data.draw(st.integers(0, len(weights) - 1))
    without = [torch.zeros(8) if at == gone else each for at, each in enumerate(updates)]
    moved = torch.linalg.vector_norm(mean_of(updates, weights) - mean_of(without, weights))
    assert float(moved) <= level().sensitivity(clip, weights, 0.0) * (1 + 1e-5)


def test_the_largest_weight_decides_and_not_the_number_of_clinics():
    """The peers' fault: clip / n, with a mean over rows, understates by n times that share."""
    assert level().sensitivity(2.0, [8, 1, 1], 0.0) == pytest.approx(1.6)
    assert level().sensitivity(2.0, [1, 1, 1], 0.0) == pytest.approx(2 / 3)
    moved = mean_of([torch.eye(8)[0], torch.zeros(8), torch.zeros(8)], [8, 1, 1])
    assert float(torch.linalg.vector_norm(moved)) == pytest.approx(0.8)


def test_what_quantisation_may_add_counts():
    assert level().sensitivity(2.0, [1, 1], 0.05) == pytest.approx(1.05)


@pytest.mark.parametrize("weights", [[8, 1, 1], [1, 1, 1], [3, 2, 5, 1]])
def test_the_noise_that_is_measured_is_that_of_the_largest_weight(weights: list[float]):
    released = level(1.3).release(ZERO, clip=2.0, weights=weights, within_clip=1)
    share = max(weights) / sum(weights)
    z_update = (1.3**-2 - (2 * 1.3) ** -2) ** -0.5
    assert released.noise == pytest.approx(z_update * 2.0 * share)
    # Over 20,000 draws the deviation itself is known to half a percent.
    assert float(released.mean.values.std()) == pytest.approx(released.noise, rel=0.025)
    assert abs(float(released.mean.values.mean())) < 4 * released.noise / math.sqrt(SIZE)


def test_the_update_pays_for_the_count_that_steers_the_clip():
    """Andrew et al. 2021, theorem 1: both together are the Gaussian mechanism of z."""
    released = level(2.0).release(ZERO, clip=1.0, weights=[1], within_clip=0)
    count_sigma = 2.0
    assert released.noise**-2 + (2 * count_sigma) ** -2 == pytest.approx(2.0**-2)


def test_the_mean_is_released_with_noise_only_and_stays_as_it_was_for_the_caller():
    mean = AdapterState(SCHEMA, torch.full((SIZE,), 0.25))
    released = level().release(mean, clip=1.0, weights=[1, 1], within_clip=2)
    assert torch.equal(mean.values, torch.full((SIZE,), 0.25))
    assert float((released.mean.values - mean.values).abs().min()) >= 0
    assert not torch.equal(released.mean.values, mean.values)
    assert float(released.mean.values.mean()) == pytest.approx(0.25, abs=0.02)


# The clip


def follow(updates: list[float], clip: float, *, target: float, rounds: int = 60) -> float:
    """Return the clip after rounds over clinics whose updates have these norms."""
    at = level(1e-2, target=target)
    zero = AdapterState(SMALL, torch.zeros(8))
    for _ in range(rounds):
        within = sum(norm <= clip for norm in updates)
        clip = at.release(
            zero, clip=clip, weights=[1.0] * len(updates), within_clip=within
        ).next_clip
    return clip


@pytest.mark.parametrize("begin", [0.05, 40.0])
@pytest.mark.parametrize(("target", "quantile"), [(0.5, 5.5), (0.8, 8.5)])
def test_the_clip_finds_the_target_quantile_from_either_side(
    begin: float, target: float, quantile: float
):
    found = follow([float(norm) for norm in range(1, 11)], begin, target=target)
    assert found == pytest.approx(quantile, rel=0.25)


@pytest.mark.parametrize("within", [0, 3, 10])
def test_the_clip_moves_by_the_noisy_count_only(within: int):
    weights = [1.0] * 10
    zero = AdapterState(SMALL, torch.zeros(8))
    clips = {
        level(5.0, seed=seed).release(zero, clip=1.0, weights=weights, within_clip=within).next_clip
        for seed in range(200)
    }
    # Noise this large covers the count: it can be anything, and the clip stays in its steps.
    least, most = math.exp(-0.2 * 0.5), math.exp(0.2 * 0.5)
    assert min(clips) == pytest.approx(least)
    assert max(clips) == pytest.approx(most)
    assert len(clips) > 50


def test_the_same_draws_and_count_give_the_same_clip_whatever_the_updates_are():
    found = {
        level()
        .release(AdapterState(SMALL, torch.full((8,), value)), clip=1.0, weights=[1], within_clip=1)
        .next_clip
        for value in (0.0, 0.1, 0.3)
    }
    assert len(found) == 1


# What it costs


def test_rounds_add_up_without_amplification():
    real = ClinicLevel(4.0, 0.5, GaussianNoise())
    none = real.spent(0, 1e-5, 0.5)
    assert (none.epsilon, none.steps, none.clip) == (0.0, 0, 0.5)
    spent = [real.spent(rounds, 1e-5, 0.5).epsilon for rounds in (1, 2, 10)]
    gaussian = Charge(noise="gaussian", noise_multiplier=4.0)
    assert spent == [epsilon_of({gaussian: rounds}, 1e-5).epsilon for rounds in (1, 2, 10)]


def test_noise_of_a_known_seed_has_no_bound():
    found = level(4.0).spent(2, 1e-5, 0.5)
    assert (found.epsilon, found.epsilon_rdp, found.steps) == (None, None, 2)


def test_automatic_noise_is_for_every_round_of_the_run():
    multiplier = multiplier_for(3.0, 1e-5, 12)
    assert multiplier == calibrated(3.0, 1e-5, 1.0, 12)
    real = ClinicLevel(multiplier, 0.5, GaussianNoise())
    spent = real.spent(12, 1e-5, 1.0).epsilon
    assert spent is not None
    assert 2.9 < spent <= 3.0


def test_noise_and_signal_are_compared_at_equal_weights():
    z_update = 1 / math.sqrt(0.75)
    assert level(1.0).noise_to_signal(10, 10_000) == pytest.approx(z_update * 100 / 10)
