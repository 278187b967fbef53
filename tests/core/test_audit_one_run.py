"""The bound on epsilon: published values, and mechanisms whose epsilon is known."""

import math

import numpy as np
import pytest

from fedpeft.audit.one_run import GUESSED_SHARES, audit_coins, lower_bound, p_value

DELTA = 1e-5


@pytest.mark.parametrize(
    ("case", "expected"),
    [((1000, 100, 75, 1e-4), 0.673), ((100_000, 1510, 1439, 1e-5), 2.675)],
    ids=["appendix D", "section 7"],
)
def test_bounds_are_those_that_the_paper_prints(case: tuple[int, int, int, float], expected: float):
    assert lower_bound(*case, 0.05) == pytest.approx(expected, abs=1e-3)


def brute_force(m: int, r: int, v: int, epsilon: float, delta: float) -> float:
    """Theorem 5.2, written down as it stands."""
    hit = 1 / (1 + math.exp(-epsilon))
    chances = [math.comb(r, k) * hit**k * (1 - hit) ** (r - k) for k in range(r + 1)]
    worst = max(
        sum(chances[k] for k in range(r + 1) if v - i <= k < v) / i for i in range(1, m + 1)
    )
    return min(1.0, sum(chances[v:]) + 2 * m * delta * worst)


@pytest.mark.parametrize("delta", [0.0, 1e-3])
@pytest.mark.parametrize("epsilon", [0.0, 0.7, 3.0])
def test_the_p_value_is_that_of_the_theorem(epsilon: float, delta: float):
    for m, r, v in [(1, 1, 1), (9, 4, 0), (9, 4, 3), (30, 30, 24), (30, 20, 20)]:
        found = p_value(m, r, v, epsilon, delta)
        assert found == pytest.approx(brute_force(m, r, v, epsilon, delta), rel=1e-9)


def test_a_larger_epsilon_is_harder_to_refute():
    values = [p_value(96, 48, 40, epsilon, DELTA) for epsilon in np.linspace(0, 8, 60)]
    assert values == sorted(values)


@pytest.mark.parametrize("case", [(4, 5, 1), (4, 3, 4), (4, 3, -1)])
def test_counts_that_do_not_fit_are_refused(case: tuple[int, int, int]):
    with pytest.raises(ValueError, match="correct <= guesses"):
        p_value(*case, 1.0, 0.0)


def randomised_response(
    epsilon: float, canaries: int, draw: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Coins, and scores that tell each of them with exactly ``epsilon``-privacy."""
    coins = draw.random(canaries) < 0.5
    told = coins ^ (draw.random(canaries) > 1 / (1 + math.exp(-epsilon)))
    return coins, told.astype(np.float64)


@pytest.mark.parametrize("epsilon", [0.0, 0.5, 2.0])
def test_the_bound_is_above_the_true_epsilon_in_at_most_five_percent_of_runs(epsilon: float):
    draw = np.random.default_rng(7)
    bounds: list[float] = []
    for _ in range(300):
        coins, told = randomised_response(epsilon, 120, draw)
        bounds.append(audit_coins(told, [1] * 120, coins, 0.0).lower)
    assert np.mean([bound > epsilon for bound in bounds]) <= 0.05


def test_the_bound_approaches_the_true_epsilon():
    coins, told = randomised_response(2.0, 20_000, np.random.default_rng(3))
    assert 1.9 < audit_coins(told, [1] * len(coins), coins, 0.0).lower <= 2.0


def test_scores_that_know_nothing_give_no_bound():
    draw = np.random.default_rng(1)
    lower = [
        audit_coins(draw.normal(size=90), [1, 4, 16] * 30, draw.random(90) < 0.5, DELTA).lower
        for _ in range(40)
    ]
    assert sum(bound > 0 for bound in lower) <= 2


def test_every_guess_right_gives_the_closed_form():
    coins = np.arange(96) % 2 == 0
    found = audit_coins(coins * 9.0, [1] * 96, coins, 0.0)
    hit = (0.05 / len(GUESSED_SHARES)) ** (1 / 96)
    assert (found.canaries, found.guesses, found.correct) == (96, 96, 96)
    assert found.lower == pytest.approx(math.log(hit / (1 - hit)), abs=1e-6)


def test_groups_are_judged_by_thresholds_of_their_own():
    coins = np.arange(80) % 2 == 0
    groups = [1] * 40 + [16] * 40
    scores = coins * 1.0 + np.repeat([0.0, 100.0], 40)
    assert audit_coins(scores, groups, coins, 0.0).correct == 80
