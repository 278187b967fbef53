"""What one step costs in privacy, as the ledger writes it down and the accountant adds it up."""

from dataclasses import dataclass
from typing import Literal

NoiseKind = Literal["gaussian", "skellam", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Charge:
    """One access to the data: a Poisson sample of the units, clipped, summed, with noise.

    ``noise`` is the distribution: ``gaussian`` (continuous), ``skellam`` (on a grid, the
    sum of several clinics' shares) or ``none`` (no noise at all: epsilon is infinite).
    ``sampling_rate`` is the probability, in (0, 1], with which a unit is in the sample;
    1 where there is no sampling. ``noise_multiplier`` is the standard deviation of the
    noise over ``sensitivity``, the most that one unit changes the sum (L2 norm), above 0;
    0 for ``none``. For ``skellam``, ``l2`` and ``l1`` are the sensitivities in units of
    the grid (``l1 <= l2 ** 2`` for whole numbers); 0 otherwise.
    """

    noise: NoiseKind
    sampling_rate: float = 1.0
    noise_multiplier: float = 0.0
    l2: float = 0.0
    l1: float = 0.0
