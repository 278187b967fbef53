"""A lower bound on epsilon from one training run, by guessing which canaries took part.

Steinke, Nasr and Jagielski 2023, "Privacy Auditing with One (1) Training Run"
(arXiv:2305.08846). Each of m canaries took part with probability 1/2,
independently. Whoever sees only the output of an (epsilon, delta)-private training
cannot guess these coins much better than randomised response gives them away. So
many correct guesses refute small values of epsilon. Knows nothing of models or files.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

CONFIDENCE = 0.95
GUESSED_SHARES = (1.0, 0.5, 0.25)
"""Shares of the canaries to guess on; chosen before any score is seen."""
_LARGEST_EPSILON = 64.0
_HALVINGS = 40


@dataclass(frozen=True, slots=True)
class EpsilonBound:
    """Training was not (epsilon, ``delta``)-private for any epsilon below ``lower``.

    At ``confidence`` (0 to 1), from ``correct`` of ``guesses`` right guesses about
    ``canaries`` coins. There is no upper end: another attack may do better.
    ``level`` is the p-value that was asked for, after correction for the
    :data:`GUESSED_SHARES`.
    """

    lower: float
    delta: float
    confidence: float
    level: float
    canaries: int
    guesses: int
    correct: int


def p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """Return how likely so many correct guesses are at most under (epsilon, delta)-privacy.

    Theorem 5.2 of the paper, with W ~ Binomial(guesses, 1/(1 + exp(-epsilon))):
    P[W >= correct] + 2 * canaries * delta * max over i >= 1 of P[correct > W >= correct - i] / i.

    Args:
        canaries: m, each of which took part with probability 1/2.
        guesses: r, the most guesses made; on the others the auditor abstains.
        correct: v, right guesses.
        epsilon: at least 0.
        delta: 0 to 1.

    Raises:
        ValueError: the counts do not fit each other, or epsilon or delta is out of its range.
    """
    if not 0 <= correct <= guesses <= canaries or epsilon < 0 or not 0 <= delta <= 1:
        raise ValueError(
            f"need 0 <= correct <= guesses <= canaries, epsilon >= 0 and 0 <= delta <= 1, not "
            f"{correct}, {guesses}, {canaries}, {epsilon} and {delta}"
        )
    chances = _binomial(guesses, epsilon)
    below = np.cumsum(chances[:correct][::-1])
    # Beyond i = correct the probability stays and the divisor grows.
    worst = float(np.max(below / np.arange(1, correct + 1))) if correct else 0.0
    return min(1.0, float(chances[correct:].sum()) + 2 * canaries * delta * worst)


def lower_bound(canaries: int, guesses: int, correct: int, delta: float, level: float) -> float:
    """Return the largest epsilon that is refuted at ``level`` (a p-value), or 0.

    Args:
        canaries: see :func:`p_value`, as ``guesses``, ``correct`` and ``delta``.
        level: 1 - confidence.
    """

    def refuted(epsilon: float) -> bool:
        return p_value(canaries, guesses, correct, epsilon, delta) < level

    if not refuted(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while high < _LARGEST_EPSILON and refuted(high):
        low, high = high, 2 * high
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def audit_coins(
    scores: Floats, groups: Sequence[int], took_part: npt.NDArray[np.bool_], delta: float
) -> EpsilonBound:
    """Guess the coins from the scores, and return the bound that the guesses give.

    Tries every share of :data:`GUESSED_SHARES`, each at a share of the error
    probability (Bonferroni), and returns the best bound.

    Args:
        scores: float64, shape (m,): the higher, the more it seems that a canary took part.
        groups: m labels; within one, scores are comparable (the same number of repetitions).
        took_part: bool, shape (m,): the coins.
        delta: of the guarantee that is audited.
    """
    sides = _centred(scores, np.asarray(groups))
    right = (sides > 0) == took_part
    surest_first = np.argsort(-np.abs(sides), kind="stable")
    level = (1 - CONFIDENCE) / len(GUESSED_SHARES)
    bounds: list[EpsilonBound] = []
    for share in GUESSED_SHARES:
        guesses = math.ceil(share * len(scores))
        correct = int(right[surest_first[:guesses]].sum())
        lower = lower_bound(len(scores), guesses, correct, delta, level)
        bounds.append(EpsilonBound(lower, delta, CONFIDENCE, level, len(scores), guesses, correct))
    return max(bounds, key=lambda bound: bound.lower)


def _centred(scores: Floats, groups: npt.NDArray[np.int_]) -> Floats:
    """Subtract from each score the threshold of its group, which is found without the coins.

    It lies halfway between the means of the highest and of the lowest quarter:
    about half of a group took part, so the quarters are nearly pure.
    """
    centred = np.empty_like(scores)
    for group in np.unique(groups):
        members = groups == group
        ordered = np.sort(scores[members])
        quarter = max(1, len(ordered) // 4)
        centred[members] = scores[members] - (
            (ordered[:quarter].mean() + ordered[-quarter:].mean()) / 2
        )
    return centred


def _binomial(trials: int, epsilon: float) -> Floats:
    """Return P[W = 0..trials] of W ~ Binomial(trials, 1/(1 + exp(-epsilon)))."""
    log_hit = -math.log1p(math.exp(-epsilon))
    log_miss = log_hit - epsilon
    hits = np.arange(trials + 1)
    return np.exp(_log_ways(trials) + hits * log_hit + (trials - hits) * log_miss)


@functools.lru_cache(maxsize=16)
def _log_ways(trials: int) -> Floats:
    """Return ln of the binomial coefficients; every step of a bisection needs the same."""
    log_factorials = np.array([math.lgamma(count + 1) for count in range(trials + 1)])
    return log_factorials[-1] - log_factorials - log_factorials[::-1]
