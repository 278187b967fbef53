"""What the steps that were charged cost together: epsilon, and whether more steps fit.

*Formal guarantees.* Every figure is an upper bound on epsilon at the given delta, for one
unit added or removed, under Poisson sampling, for the charges as given: steps that ran
but were not charged are not in it, nor is amplification by the choice of clinics. The
bounds are privacy loss distributions, discretised pessimistically by connecting the
dots (Doroshenko et al. 2022), for Gaussian noise; Rényi curves (``renyi``) for every
noise. The guarantee is the smaller one. Nothing here writes, and nothing is remembered
but results of pure functions.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from dp_accounting.pld import privacy_loss_distribution
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

from fedpeft.errors import PrivacyError
from fedpeft.privacy.charge import Charge
from fedpeft.privacy.renyi import ORDERS, Curve, composed_curve, epsilon_of_curve

_LEAST_NOISE = 1e-2
"""Noise below this multiplier counts as none: its epsilon is in the thousands."""
_MOST_NOISE = 1e6
"""A larger multiplier is a mistake, and would leave no digits to compute with."""

# A privacy loss is put on a grid. Rounding to it adds about steps * interval^2 / 6 to
# the variance of the sum; with this share of the variance itself epsilon keeps three digits.
_ADDED_VARIANCE = 2e-3
_COARSEST = 2.0**-9
_FINEST_PER_STEP = 1e-10
"""On a finer grid the masses of points, second differences, would consist of rounding errors."""
_LARGEST_GRID = 2**13
"""Most points of one step's losses; beyond, the grid is coarser and the bound looser."""
_QUICK = 4
"""How many times coarser the grid of a first answer is."""
_HALVED_TO = 1e-6
"""Part of an epsilon beyond 709 to which it is found."""
_TAIL = 11.0
"""Standard deviations of noise within which dp_accounting looks at losses: exp(-50) is outside."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """What a mechanism has cost at ``delta``: ``epsilon`` is the guarantee.

    It is the smaller one of ``epsilon_rdp`` and ``epsilon_pld``, which is None where there
    is Skellam noise or delta is too small for it (about 1e-9 with 10,000 steps). All are
    infinite where a step had no noise.
    """

    epsilon: float
    epsilon_pld: float | None
    epsilon_rdp: float
    delta: float


def epsilon_of(charges: Mapping[Charge, int], delta: float) -> Spent:
    """Return what all steps cost together; ``charges`` says how many were of each kind.

    Raises ``PrivacyError`` if delta is not within (0, 1), or if a charge or a number of
    steps is not one that can have been charged: no bound would hold for it.
    """
    charges = _checked(charges, delta)
    if any(_is_noiseless(charge) for charge in charges):
        pld = None if _has_skellam(charges) else math.inf
        return Spent(epsilon=math.inf, epsilon_pld=pld, epsilon_rdp=math.inf, delta=delta)
    curve = composed_curve(charges)
    rdp = epsilon_of_curve(curve, delta)
    counted = _delta_less_rounding(charges, delta)
    if _has_skellam(charges) or counted is None:
        return Spent(epsilon=rdp, epsilon_pld=None, epsilon_rdp=rdp, delta=delta)
    pld = 0.0
    if charges:
        pld = _epsilon_of_losses(_composed(charges, curve, rdp), counted, rdp)
    return Spent(epsilon=min(pld, rdp), epsilon_pld=pld, epsilon_rdp=rdp, delta=delta)


def _epsilon_of_losses(losses: PrivacyLossDistribution, delta: float, most: float) -> float:
    """Return the epsilon of composed losses; ``most`` is another bound on it."""
    with np.errstate(over="ignore"):
        epsilon = float(losses.get_epsilon_for_delta(delta))
    if epsilon < math.inf or losses.get_delta_for_epsilon(most) > delta:
        return epsilon
    # The library reckons with e^epsilon, which ends at epsilon = 709; delta for it does not.
    least = 0.0
    while most - least > _HALVED_TO * most:
        middle = (least + most) / 2
        if losses.get_delta_for_epsilon(middle) <= delta:
            most = middle
        else:
            least = middle
    return most


def fits(
    charges: Mapping[Charge, int], step: Charge, steps: int, delta: float, max_epsilon: float
) -> bool:
    """Return whether ``steps`` more of ``step`` keep epsilon at or below ``max_epsilon``.

    Each bound is asked only where a quicker one said no: Rényi curves (microseconds once
    known), losses on a coarse grid, losses on the grid that ``epsilon_of`` uses.

    Raises what ``epsilon_of`` raises.
    """
    if steps < 0:
        raise PrivacyError(f"{steps} steps cannot be charged; charge 0 or more")
    charges = _checked({**charges, step: charges.get(step, 0) + steps}, delta)
    if any(_is_noiseless(charge) for charge in charges):
        return max_epsilon == math.inf
    curve = composed_curve(charges)
    rdp = epsilon_of_curve(curve, delta)
    if rdp <= max_epsilon:
        return True
    counted = _delta_less_rounding(charges, delta)
    if _has_skellam(charges) or counted is None or not max_epsilon >= 0:
        return False
    return any(
        float(_composed(charges, curve, rdp, grid).get_delta_for_epsilon(max_epsilon)) <= counted
        for grid in (_QUICK, 1)
    )


def most_steps(
    charges: Mapping[Charge, int], step: Charge, delta: float, max_epsilon: float, at_most: int
) -> int:
    """Return how many more of ``step``, 0 to ``at_most``, keep epsilon at ``max_epsilon`` or less.

    0 also where the charges pass it already. Raises what ``epsilon_of`` raises.
    """
    if fits(charges, step, at_most, delta, max_epsilon):
        return at_most
    fitting, passing = 0, at_most
    while passing - fitting > 1:
        middle = (fitting + passing) // 2
        if fits(charges, step, middle, delta, max_epsilon):
            fitting = middle
        else:
            passing = middle
    return fitting


def _checked(charges: Mapping[Charge, int], delta: float) -> dict[Charge, int]:
    """Return the charges that were made at all."""
    if not 0 < delta < 1:
        raise PrivacyError(f"delta is {delta}; it must lie between 0 and 1")
    for charge, steps in charges.items():
        if steps < 0:
            raise PrivacyError(f"{steps} steps cannot have been charged; the ledger is wrong")
        if not _is_possible(charge):
            raise PrivacyError(f"no privacy bound is known for {charge}: a value is out of range")
    return {charge: steps for charge, steps in charges.items() if steps}


def _is_possible(charge: Charge) -> bool:
    if not (0 < charge.sampling_rate <= 1 and 0 <= charge.noise_multiplier <= _MOST_NOISE):
        return False
    # No vector has an L1 norm below its L2 norm.
    return charge.noise != "skellam" or 0 < charge.l2 <= charge.l1 < math.inf


def _is_noiseless(charge: Charge) -> bool:
    return charge.noise == "none" or charge.noise_multiplier < _LEAST_NOISE


def _has_skellam(charges: Mapping[Charge, int]) -> bool:
    return any(charge.noise == "skellam" for charge in charges)


def _delta_less_rounding(charges: Mapping[Charge, int], delta: float) -> float | None:
    """Return the delta to read a composed distribution at; None if rounding rivals ``delta``.

    Distributions are composed by Fourier transforms in float64. Against exact results the
    tail was wrong by 2e-14 after 10,000 steps; this allows for fifty times as much.
    """
    rounding = 1e-13 + 1e-16 * sum(charges.values())
    return delta - rounding if rounding < delta / 500 else None


def _composed(
    charges: Mapping[Charge, int], curve: Curve, epsilon: float, coarser: int = 1
) -> PrivacyLossDistribution:
    interval = _interval(charges, curve, epsilon) * coarser
    parts = sorted(
        (charge.sampling_rate, charge.noise_multiplier, steps) for charge, steps in charges.items()
    )
    return _sum_of_losses(tuple(parts), interval)


def _interval(charges: Mapping[Charge, int], curve: Curve, epsilon: float) -> float:
    """Return the distance of the points on which losses are put, a power of √2.

    The divergence of order α is about α/2 times the variance of the loss; a power keeps
    what is remembered of single steps usable when their number grows.
    """
    variance = 2 * float((curve / ORDERS).min())
    steps = sum(charges.values())
    interval = math.sqrt(6 * _ADDED_VARIANCE * variance / steps)
    interval = min(interval, max(_COARSEST, epsilon / 2**13))
    interval = max(interval, max(_largest_loss(charge) for charge in charges) / _LARGEST_GRID)
    interval = max(interval, steps * _FINEST_PER_STEP)
    return 2.0 ** (math.floor(2 * math.log2(interval)) / 2)


def _largest_loss(charge: Charge) -> float:
    """Return the loss at the far end of the noise, for a unit that is in the data."""
    noise = charge.noise_multiplier
    exponent = (_TAIL + 1 / (2 * noise)) / noise
    held = min(exponent, 700.0)  # exp of more overflows
    return math.log1p(charge.sampling_rate * math.expm1(held)) + exponent - held


@functools.lru_cache(maxsize=8)
def _sum_of_losses(
    parts: tuple[tuple[float, float, int], ...], interval: float
) -> PrivacyLossDistribution:
    first, *others = (_losses(rate, noise, steps, interval) for rate, noise, steps in parts)
    for other in others:
        first = first.compose(other)
    return first


@functools.lru_cache(maxsize=16)
def _losses(rate: float, noise: float, steps: int, interval: float) -> PrivacyLossDistribution:
    return _loss(rate, noise, interval).self_compose(steps)


@functools.lru_cache(maxsize=32)
def _loss(rate: float, noise: float, interval: float) -> PrivacyLossDistribution:
    return privacy_loss_distribution.from_gaussian_mechanism(
        noise,
        pessimistic_estimate=True,
        value_discretization_interval=interval,
        sampling_prob=rate,
        use_connect_dots=True,
    )
