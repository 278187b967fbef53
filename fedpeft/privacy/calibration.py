"""From a privacy goal to the noise that reaches it, and the values of delta that mean anything.

Everything is checked with ``accounting.epsilon_of``, so what comes back keeps the bound.
"""

import functools
import math
from collections.abc import Callable

from fedpeft.errors import PrivacyError
from fedpeft.privacy.accounting import epsilon_of
from fedpeft.privacy.charge import Charge
from fedpeft.privacy.renyi import composed_curve, epsilon_of_curve

_USUAL_DELTA = 1e-5

# Multipliers of three digits, 0.0100 to 10,000, by their place among all of them.
_FIRST_EXPONENT, _LAST_PLACE = -4, 900 * 6


def default_delta(units: int) -> float:
    """Return the delta to use with ``units`` protected units: 1e-5, or less for many units.

    At 1/units a mechanism that gives one unit away outright would pass (Dwork and Roth
    2014, section 2.3), so it is at most half of that.

    Raises ``PrivacyError`` if there is no unit.
    """
    _require_units(units)
    return min(_USUAL_DELTA, 1 / (2 * units))


def require_delta(delta: float, units: int) -> None:
    """Raise ``PrivacyError`` if delta is 1/units or more: it promises those units nothing."""
    _require_units(units)
    if not 0 < delta < 1 / units:
        raise PrivacyError(
            f"delta is {delta:g} in [privacy], yet with {units} protected units here it must be "
            f"above 0 and below 1/{units}, or one of them could be given away outright; "
            f"set it to {default_delta(units):g} or less"
        )


@functools.lru_cache(maxsize=64)
def calibrated(epsilon: float, delta: float, sampling_rate: float, steps: int) -> float:
    """Return the least noise multiplier, to three digits, that keeps ``epsilon`` at ``delta``.

    For ``steps`` Poisson-sampled Gaussian steps; 0.01 or more, rounded up.

    Raises ``PrivacyError`` if no multiplier up to 10,000 does, or a value is out of range.
    """
    _require_goal(epsilon, steps)

    def gaussian(noise: float) -> dict[Charge, int]:
        charge = Charge(noise="gaussian", sampling_rate=sampling_rate, noise_multiplier=noise)
        return {charge: steps}

    def enough_by_renyi(place: int) -> bool:
        return epsilon_of_curve(composed_curve(gaussian(_multiplier(place))), delta) <= epsilon

    def enough(place: int) -> bool:
        return epsilon_of(gaussian(_multiplier(place)), delta).epsilon <= epsilon

    if not enough(_LAST_PLACE):
        raise _unreachable(epsilon, delta, sampling_rate, steps)
    # Rényi curves are quick and need more noise, in practice less than twice as much.
    high = _least(enough_by_renyi, 0, _LAST_PLACE)
    low = max(high - 900, 0)
    return _multiplier(_least(enough, 0 if enough(low) else low, high))


def calibrated_skellam(
    epsilon: float, delta: float, sampling_rate: float, steps: int, l2: float, l1: float
) -> float:
    """Return what ``calibrated`` returns, for Skellam noise on a grid.

    ``l2`` and ``l1`` are the sensitivities in units of the grid. Raises what it raises.
    """
    _require_goal(epsilon, steps)

    def enough(place: int) -> bool:
        charge = Charge(
            noise="skellam",
            sampling_rate=sampling_rate,
            noise_multiplier=_multiplier(place),
            l2=l2,
            l1=l1,
        )
        return epsilon_of({charge: steps}, delta).epsilon <= epsilon

    if not enough(_LAST_PLACE):
        raise _unreachable(epsilon, delta, sampling_rate, steps)
    return _multiplier(_least(enough, 0, _LAST_PLACE))


def share_multiplier(total: float, honest: int) -> float:
    """Return the noise multiplier of each clinic's share, of which ``honest`` make up ``total``.

    The variances of independent Gaussian or Skellam shares add up.

    Raises ``PrivacyError`` if there is no honest clinic.
    """
    if honest < 1:
        raise PrivacyError(f"{honest} clinics cannot make up the noise; it takes at least 1")
    return total / math.sqrt(honest)


def remaining_multiplier(total: float, honest: int, colluding: int) -> float:
    """Return the noise multiplier left of ``total`` when ``colluding`` of the shares are known.

    Shares are known of clinics that tell them to the reader, and missing of those that
    dropped out. Raises ``PrivacyError`` if that leaves no share, or the count is negative.
    """
    if not 0 <= colluding < honest:
        raise PrivacyError(
            f"with {colluding} colluding clinics of {honest} that add noise, none of it protects; "
            "fewer must collude than add noise"
        )
    return share_multiplier(total, honest) * math.sqrt(honest - colluding)


def _multiplier(place: int) -> float:
    exponent, digits = divmod(place, 900)
    return float(f"{100 + digits}e{exponent + _FIRST_EXPONENT}")


def _least(enough: Callable[[int], bool], low: int, high: int) -> int:
    """Return the least place from ``low`` to ``high`` that is enough; ``high`` if none below is."""
    while low < high:
        middle = (low + high) // 2
        if enough(middle):
            high = middle
        else:
            low = middle + 1
    return high


def _require_units(units: int) -> None:
    if units < 1:
        raise PrivacyError(f"there are {units} units to protect; privacy needs at least 1")


def _require_goal(epsilon: float, steps: int) -> None:
    if not 0 < epsilon < math.inf:
        raise PrivacyError(f"epsilon is {epsilon}; noise can be found for a finite one above 0")
    if steps < 1:
        raise PrivacyError(f"noise cannot be found for {steps} steps; plan at least 1")


def _unreachable(epsilon: float, delta: float, sampling_rate: float, steps: int) -> PrivacyError:
    return PrivacyError(
        f"no noise multiplier up to {_multiplier(_LAST_PLACE):g} keeps epsilon at {epsilon:g} "
        f"(delta {delta:g}) over {steps} steps that sample {sampling_rate:g} of the units; "
        "allow a larger epsilon or plan fewer steps"
    )
