"""Gaussian and Skellam noise: their laws, independence, grids and sources."""

import ast
import math
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import special, stats

import fedpeft
from fedpeft.errors import PrivacyError
from fedpeft.privacy import skellam
from fedpeft.privacy.noise import GaussianNoise, grid_of
from fedpeft.privacy.sampling import CHUNK, PoissonSampler
from fedpeft.privacy.skellam import SkellamNoise, grid_for, round_to_grid, sensitivities

DRAWS = 1_000_000
ROOT = Path(fedpeft.__file__).parent / "privacy"
WEAK = {
    *("random", "default_rng", "RandomState", "rand", "randn", "randint", "randperm"),
    *("normal", "normal_", "uniform_", "random_", "bernoulli", "bernoulli_", "poisson"),
    *("exponential_", "cauchy_", "log_normal_", "geometric_", "multinomial"),
    *("rand_like", "randn_like", "randint_like", "Generator", "manual_seed", "dropout"),
}


def weak_names(source: str) -> set[str]:
    """Return the names of weak generators that a module's source imports or reaches."""
    return {name for node in ast.walk(ast.parse(source)) for name in names_of(node)} & WEAK


def names_of(node: ast.AST) -> Iterator[str]:
    match node:
        case ast.Import(names=names):
            yield from (part for alias in names for part in alias.name.split("."))
        case ast.ImportFrom(module=str(module), names=names):
            yield from (*module.split("."), *(alias.name for alias in names))
        case ast.Attribute(attr=attribute):
            yield attribute
        case ast.Constant(value=str(text)):
            yield text
        case _:
            pass


@pytest.mark.parametrize("name", ["noise.py", "sampling.py", "skellam.py"])
def test_a_module_has_no_source_of_weak_randomness(name: str):
    assert weak_names((ROOT / name).read_text(encoding="utf-8")) == set()


@pytest.mark.parametrize(
    "tampered",
    [
        "import random",
        "from numpy.random import beta",
        "import numpy as np\nnp.random.beta(1, 2)",
        "import torch\ntorch.randn(3)",
        "import torch\ntorch.zeros(3).normal_()",
        "from torch import Generator",
        "import torch\ngetattr(torch, 'randn')(3)",
    ],
)
def test_tampering_is_caught(tampered: str):
    assert weak_names(tampered)


def test_drawing_leaves_the_generators_of_python_numpy_and_torch_alone():
    def states():
        numpy_state = repr(np.random.get_state(legacy=False))
        return [random.getstate(), numpy_state, torch.get_rng_state().tolist()]

    before = states()
    GaussianNoise().add_to(torch.zeros(10), 1.0)
    SkellamNoise().draw(10, 1e6)
    PoissonSampler().sample(10, 0.5)
    PoissonSampler().choose(10, 5)
    assert states() == before


def test_normal_noise_follows_the_normal_law():
    drawn = GaussianNoise.seeded(1).draw(DRAWS)
    assert stats.kstest(drawn, "norm").pvalue > 1e-3
    assert abs(drawn.mean()) < 4 / math.sqrt(DRAWS)
    assert drawn.var() == pytest.approx(1, abs=4 * math.sqrt(2 / DRAWS))
    assert np.mean(drawn**3) == pytest.approx(0, abs=4 * math.sqrt(15 / DRAWS))
    assert np.mean(drawn**4) == pytest.approx(3, abs=4 * math.sqrt(96 / DRAWS))


@pytest.mark.parametrize("beyond", [2.0, 3.0, 4.0, 4.5])
def test_both_tails_of_normal_noise_are_full(beyond: float):
    drawn = GaussianNoise.seeded(2).draw(4 * DRAWS)
    expected = 4 * DRAWS * stats.norm.sf(beyond)
    for tail in (drawn > beyond, drawn < -beyond):
        assert np.count_nonzero(tail) == pytest.approx(expected, abs=4 * math.sqrt(expected))


def test_the_least_uniform_gives_a_finite_normal_number(monkeypatch: pytest.MonkeyPatch):
    noise = GaussianNoise()
    monkeypatch.setattr(noise._uniforms, "words", lambda size: np.zeros(size, "<u8"))
    assert noise.draw(2)[0] == pytest.approx(math.sqrt(2 * 128 * math.log(2)))


@pytest.mark.parametrize("lag", [1, 2, CHUNK, 2 * CHUNK])
def test_coordinates_are_uncorrelated_also_in_size(lag: int):
    drawn = GaussianNoise.seeded(3).draw(DRAWS)
    for values in (drawn, (drawn**2 - 1) / math.sqrt(2)):
        assert abs(np.mean(values[lag:] * values[:-lag])) < 5 / math.sqrt(DRAWS - lag)


def test_the_two_numbers_of_a_pair_are_independent():
    drawn = GaussianNoise.seeded(4).draw(2 * CHUNK)
    counts = np.histogram2d(special.ndtr(drawn[:CHUNK]), special.ndtr(drawn[CHUNK:]), bins=8)[0]
    assert stats.chisquare(counts.ravel()).pvalue > 1e-4


def test_steps_and_clinics_are_uncorrelated():
    clinics = [GaussianNoise.seeded(5, "clinic", number) for number in range(3)]
    steps = np.stack([clinic.draw(100_000) for clinic in clinics for _ in range(3)])
    correlations = steps @ steps.T / 100_000 - np.eye(len(steps))
    assert np.abs(correlations[np.triu_indices(len(steps), 1)]).max() < 5 / math.sqrt(100_000)


def test_fresh_noise_repeats_no_value():
    drawn = np.concatenate([GaussianNoise().draw(50_000) for _ in range(4)])
    # 2 * 10^10 pairs share about 2^-53 of the values each: a repetition is a rarity.
    assert np.unique(drawn).size >= drawn.size - 3


def test_an_odd_number_of_coordinates_is_filled():
    total = torch.zeros(2 * CHUNK + 3)
    GaussianNoise().add_to(total, 1.0)
    assert int((total == 0).sum()) < 200


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-6, 0.7, 1.0, 3e4])
def test_noise_has_the_scale_and_lies_on_the_grid(dtype: torch.dtype, scale: float):
    start = torch.linspace(-5 * scale, 5 * scale, 100_001, dtype=dtype)
    total = start.clone()
    GaussianNoise.seeded(6).add_to(total, scale)
    multiples = total.double() / grid_of(scale)
    assert torch.equal(multiples, multiples.round())
    noise = (total.double() - start.double()).numpy() / scale
    assert stats.kstest(noise, "norm").pvalue > 1e-4


def test_the_low_bits_of_the_result_do_not_depend_on_the_value():
    scale, tiny = 1.0, 2.0**-30
    for value in (0.0, tiny, 1 / 3):
        total = torch.full((200_000,), value, dtype=torch.float64)
        GaussianNoise.seeded(7, str(value)).add_to(total, scale)
        low = (total / grid_of(scale)).numpy().astype(np.int64) % 16
        assert stats.chisquare(np.bincount(low, minlength=16)).pvalue > 1e-4


def test_a_difference_that_plain_noise_tells_is_hidden_by_the_grid():
    size, value = 100_000, 2.0**-30
    plain = GaussianNoise.seeded(8).draw(size)
    assert np.all(plain + value != plain)
    results: list[torch.Tensor] = []
    for start in (0.0, value):
        total = torch.full((size,), start, dtype=torch.float64)
        GaussianNoise.seeded(8).add_to(total, 1.0)
        results.append(total)
    assert int((results[0] != results[1]).sum()) < 10


def test_a_result_of_zero_has_no_sign():
    total = torch.zeros(400_000, dtype=torch.float64)
    GaussianNoise.seeded(9).add_to(total, 1.0)
    zeros = total[total == 0]
    assert zeros.numel() > 50
    assert not torch.signbit(zeros).any()


@pytest.mark.parametrize("scale", [1e-30, 1e-7, 0.5, 0.99, 1.0, 1e30])
def test_the_grid_is_a_power_of_two_just_below_the_scale(scale: float):
    grid = grid_of(scale)
    assert math.frexp(grid)[0] == 0.5
    assert scale * 2.0**-11 < grid <= scale * 2.0**-10


def test_noise_reaches_every_element_of_a_transposed_parameter():
    parameter = torch.nn.Parameter(torch.zeros(30, 50)).T
    GaussianNoise().add_to(parameter, 1.0)
    assert int((parameter == 0).sum()) < 30


def test_a_tensor_without_elements_is_left_alone():
    total = torch.zeros(0, 4)
    GaussianNoise().add_to(total, 1.0)
    assert total.shape == (0, 4)


@pytest.mark.parametrize("scale", [0.0, -1.0, 1e-31, math.inf, math.nan])
def test_noise_without_a_scale_is_refused(scale: float):
    with pytest.raises(PrivacyError, match=f"noise of scale {scale}"):
        GaussianNoise().add_to(torch.zeros(3), scale)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 2.0**31])
def test_values_that_hide_the_noise_are_refused_and_kept(value: float):
    total = torch.tensor([0.0, value])
    with pytest.raises(PrivacyError, match="clip gradients"):
        GaussianNoise().add_to(total, 1.0)
    assert total[0] == 0


def test_other_dtypes_are_refused():
    with pytest.raises(PrivacyError, match=r"torch\.bfloat16"):
        GaussianNoise().add_to(torch.zeros(3, dtype=torch.bfloat16), 1.0)


@pytest.mark.parametrize("variance", [0.01, 2.0, 40.0, 511.0, 513.0, 2_000.0])
def test_skellam_noise_has_the_probabilities_of_its_law(variance: float):
    drawn = SkellamNoise.seeded(1).draw(400_000, variance)
    reach = math.ceil(4 * math.sqrt(variance))
    inner = stats.skellam.pmf(np.arange(-reach, reach + 1), variance / 2, variance / 2)
    expected = np.append(inner, 1 - inner.sum()) * drawn.size
    counts = np.bincount(np.clip(drawn + reach, -1, 2 * reach + 1) % (2 * reach + 2))
    counts = np.append(counts, [0] * (expected.size - counts.size))
    usual = expected > 5
    assert counts[~usual].sum() < expected[~usual].sum() + 30
    score = np.sum((counts - expected)[usual] ** 2 / expected[usual])
    assert stats.chi2.sf(score, np.count_nonzero(usual) - 1) > 1e-4


@pytest.mark.parametrize("variance", [1e6, 1e9 + 0.7, 1e12, 2.0**50])
def test_skellam_noise_of_large_variance_is_nearly_normal(variance: float):
    drawn = SkellamNoise.seeded(2).draw(400_000, variance) / math.sqrt(variance)
    assert stats.kstest(drawn, "norm").pvalue > 1e-3
    assert drawn.var() == pytest.approx(1, abs=4 * math.sqrt(2 / drawn.size))
    assert np.mean(drawn**4) == pytest.approx(3, abs=4 * math.sqrt(96 / drawn.size))


def test_low_bits_of_skellam_noise_are_uniform():
    drawn = SkellamNoise.seeded(3).draw(400_000, 1e9)
    assert stats.chisquare(np.bincount(drawn % 64, minlength=64)).pvalue > 1e-4


def test_the_shares_of_clinics_add_up_to_the_whole():
    clinics, variance = 5, 2_000.0
    shares = [SkellamNoise.seeded(4, c).draw(300_000, variance / clinics) for c in range(clinics)]
    assert np.abs(np.corrcoef(shares) - np.eye(clinics)).max() < 5 / math.sqrt(300_000)
    whole = SkellamNoise.seeded(4, "whole").draw(300_000, variance)
    edges = stats.skellam.ppf(np.linspace(0.02, 0.98, 49), variance / 2, variance / 2)
    expected = np.diff(np.r_[0, stats.skellam.cdf(edges, variance / 2, variance / 2), 1]) * 300_000
    for drawn in (np.sum(shares, axis=0), whole):
        counts = np.histogram(drawn, np.r_[-np.inf, edges + 0.5, np.inf])[0]
        assert stats.chisquare(counts, expected).pvalue > 1e-4


@pytest.mark.parametrize("mean", [256.0, 1000.3, 5e5 + 0.7, 5e8 + 0.25, 2.0**49])
def test_the_proposals_are_never_fewer_than_the_law_asks_for(mean: float):
    ends = np.geomspace(1e-13, 0.5, 20_000)
    u = np.concatenate([np.linspace(-0.4999, 0.4999, 200_001), ends - 0.5, 0.5 - ends])
    assert skellam._candidates(u, mean)[1].max() <= 1


@pytest.mark.parametrize("mean", [256.0, 300.5, 1000.3, 4000.0])
def test_poisson_probabilities_are_right_to_many_digits(mean: float):
    offsets = np.floor(np.linspace(-8, 8, 101) * math.sqrt(mean))
    offsets = offsets[offsets + math.floor(mean) >= 16]
    expected = stats.poisson.logpmf(offsets + math.floor(mean), mean)
    found = np.log(skellam._probability(offsets, mean))
    assert found == pytest.approx(expected, abs=1e-10)


def test_poisson_probabilities_of_a_large_mean_keep_their_ratio():
    # P(k + 1) / P(k) = mean / (k + 1), exactly.
    mean = 1e9
    offsets = np.array([-2e5, -1e5, -1.0, 0.0, 1e5, 2e5])
    ratio = skellam._probability(offsets + 1, mean) / skellam._probability(offsets, mean)
    assert ratio == pytest.approx(mean / (mean + offsets + 1), rel=1e-10)


@pytest.mark.parametrize("variance", [0.0, -1.0, 2.0**51, math.inf, math.nan])
def test_impossible_variances_are_refused(variance: float):
    with pytest.raises(PrivacyError, match=f"variance {variance}"):
        SkellamNoise().draw(3, variance)


@pytest.mark.parametrize(("clip", "dimension"), [(1.0, 1), (1.0, 2_400_000), (0.3, 1000)])
def test_rounding_costs_at_most_a_hundredth_of_the_sensitivity(clip: float, dimension: int):
    grid = grid_for(clip, dimension)
    assert math.frexp(grid)[0] == 0.5
    assert clip / 200 < grid * math.sqrt(dimension) <= clip / 100
    l2, l1 = sensitivities(clip, dimension, grid)
    assert clip / grid <= l2 <= 1.01 * clip / grid
    assert l1 == min(l2**2, math.sqrt(dimension) * l2)


def test_a_rounded_vector_is_no_longer_than_the_bound():
    grid = 0.25
    worst = np.full(100, 0.125 + 1e-6)
    rounded = round_to_grid(worst, grid)
    assert rounded.dtype == np.int64
    assert np.linalg.norm(rounded) <= np.linalg.norm(worst) / grid + math.sqrt(100) / 2
    assert rounded.tolist() == [1] * 100


def test_rounded_sums_can_move_by_more_than_half_a_grid_a_coordinate():
    # Why ``sensitivities`` counts sqrt(d) and not half of it.
    unit = np.full(100, 0.02)
    without = np.full(100, 0.49)
    moved = round_to_grid(without + unit, 1.0) - round_to_grid(without, 1.0)
    clip = float(np.linalg.norm(unit))
    assert np.linalg.norm(moved) > clip + math.sqrt(100) / 2
    l2, l1 = sensitivities(clip, 100, 1.0)
    assert np.linalg.norm(moved) <= l2
    assert np.abs(moved).sum() <= l1


@pytest.mark.parametrize("value", [math.nan, math.inf, 2.0**53])
def test_values_too_large_for_the_grid_are_refused(value: float):
    with pytest.raises(PrivacyError, match="clip vectors"):
        round_to_grid(np.array([0.0, value]), 1.0)


@pytest.mark.parametrize("grid", [0.0, -1.0, 0.3, math.inf, math.nan])
def test_a_grid_that_rounds_twice_is_refused(grid: float):
    for use in (lambda: round_to_grid(np.zeros(2), grid), lambda: sensitivities(1.0, 2, grid)):
        with pytest.raises(PrivacyError, match="power of two"):
            use()


@pytest.mark.parametrize(("clip", "dimension"), [(0.0, 3), (math.inf, 3), (math.nan, 3), (1.0, 0)])
def test_bounds_that_bound_nothing_are_refused(clip: float, dimension: int):
    with pytest.raises(PrivacyError, match="cannot be put on a grid"):
        grid_for(clip, dimension)
