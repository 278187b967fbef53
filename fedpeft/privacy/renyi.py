"""Rényi differential privacy of a charge, as a curve over fixed orders (Mironov 2017).

All curves are upper bounds for one unit added or removed, under Poisson sampling.
The curves of several steps add up whatever their noise and their order in time, and
``epsilon_of_curve`` reads the guarantee off the sum. Pure functions of charges.

What the curves rest on. *Gaussian*: Mironov, Talwar and Zhang 2019
(arXiv:1908.10530, section 3.3). *Skellam*: Agarwal, Kairouz and Liu 2021
(arXiv:2110.04995, corollary 3.6), at whole orders only. *Sampling*: for whole orders the
moment of the mixture (1-q)P + qQ against P is a binomial sum of the moments of Q
against P. That this direction is the larger one is theorem 5 of Mironov, Talwar and
Zhang; it asks for a map that swaps P and Q, is its own inverse and keeps volume. For
noise that is symmetric in each coordinate, and Q = P shifted by v, that is x -> v - x.
On a grid it is a bijection, which keeps the counting measure, so the proof carries over.
"""

import functools
from collections.abc import Mapping

import numpy as np
from dp_accounting.rdp import rdp_privacy_accountant
from numpy.typing import NDArray
from scipy.special import gammaln, gammasgn, log_ndtr

from fedpeft.privacy.charge import Charge

Curve = NDArray[np.float64]

_FRACTIONAL = np.array([tenths / 10 for tenths in range(11, 110) if tenths % 10])
_WHOLE = np.array([*range(2, 65), *range(72, 129, 8), 160, 192, 256, 512, 1024], np.float64)
ORDERS = np.concatenate([_FRACTIONAL, _WHOLE])
"""The orders of every curve: those of ``dp_accounting``, and a few more."""

_TERMS = 512
"""Terms of the series of a fractional order, after which it must have converged."""
_CONVERGED = 30.0
"""How far, as a logarithm, the last term must lie below the sum; that of dp_accounting."""
_LEAST_MOMENT = 1e-9
"""Logarithms of moments below it, sums of terms around 1, have lost too many digits."""


def epsilon_of_curve(curve: Curve, delta: float) -> float:
    """Return epsilon at ``delta`` (Canonne, Kamath and Steinke 2020, proposition 12)."""
    epsilon, _ = rdp_privacy_accountant.compute_epsilon(ORDERS.tolist(), curve.tolist(), delta)
    return float(epsilon)


def composed_curve(charges: Mapping[Charge, int]) -> Curve:
    """Return the sum of the curves of all steps; zeros if there are none."""
    total = np.zeros_like(ORDERS)
    for charge, steps in charges.items():
        total = total + steps * curve_of(charge)
    return total


@functools.lru_cache(maxsize=256)
def curve_of(charge: Charge) -> Curve:
    """Return the Rényi divergences of one step at ``ORDERS``; infinite where unknown.

    The array is shared between callers and cannot be written to.
    """
    if charge.noise == "none":
        curve = np.full_like(ORDERS, np.inf)
    elif charge.noise == "gaussian":
        curve = _gaussian(charge.sampling_rate, charge.noise_multiplier)
    else:
        curve = np.full_like(ORDERS, np.inf)
        curve[_FRACTIONAL.size :] = _sampled(charge.sampling_rate, _skellam(charge))
    curve.flags.writeable = False
    return curve


def _gaussian(rate: float, noise: float) -> Curve:
    if rate == 1:
        return ORDERS / (2 * noise**2)
    whole = _sampled(rate, np.arange(_WHOLE[-1] + 1) / (2 * noise**2))
    return np.concatenate([_sampled_fractional(rate, noise, whole), whole])


def _skellam(charge: Charge) -> Curve:
    """Return the bound for unsampled Skellam noise at the whole orders 0, 1, 2, ...

    α Δ2² / 2μ + min(((2α - 1) Δ2² + 6 Δ1) / 4μ², 3 Δ1 / 2μ), for noise of variance μ.
    Divided by Δ2² above and below, lest large grids overflow; orders 0 and 1 are not used.
    """
    orders = np.arange(_WHOLE[-1] + 1)
    variance = charge.noise_multiplier**2  # in units of Δ2²
    l1 = charge.l1 / charge.l2**2
    fine = ((2 * orders - 1) + 6 * l1) / (4 * variance**2) / charge.l2**2
    return orders / (2 * variance) + np.minimum(fine, 3 * l1 / (2 * variance))


def _sampled(rate: float, unsampled: Curve) -> Curve:
    """Return the curve at the whole orders of ``ORDERS`` under Poisson sampling.

    ``unsampled`` holds the divergences at the orders 0, 1, 2, ...; the moment of order α is
    Σ_l C(α, l) (1-q)^(α-l) q^l exp((l-1) ε(l)). The weights sum to 1, so it is 1 plus the
    sum of the same with exp(x) - 1, which keeps the digits of small divergences.
    """
    if rate == 1:
        return unsampled[_WHOLE.astype(np.int64)]
    terms = np.arange(2, unsampled.size)
    moments = (terms - 1) * unsampled[2:]
    with np.errstate(divide="ignore"):  # moments too small for a float add nothing
        excess = moments + np.log(-np.expm1(-moments))
    log_rest = np.log1p(-rate)
    # What depends on the term alone is added once, to the smaller array.
    excess = excess + terms * (np.log(rate) - log_rest)
    summands = _binomials() + excess
    largest = summands.max(axis=1, keepdims=True)
    summed = np.log(np.exp(summands - largest).sum(axis=1)) + largest[:, 0] + _WHOLE * log_rest
    return np.logaddexp(0.0, summed) / (_WHOLE - 1)


@functools.cache
def _binomials() -> NDArray[np.float64]:
    """Return log C(α, l) for the whole orders α by the terms l from 2, -inf for l > α."""
    order, term = _WHOLE[:, None], np.arange(2, _WHOLE[-1] + 1)
    logarithms = gammaln(order + 1) - gammaln(term + 1)
    logarithms -= gammaln(np.maximum(order - term, 0.0) + 1)
    return np.where(term <= order, logarithms, -np.inf)


@functools.cache
def _fractional_binomials() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return log |C(α, l)| and its sign for the fractional orders α by the terms l from 0."""
    order, term = _FRACTIONAL[:, None], np.arange(float(_TERMS))
    left = gammaln(order - term + 1)
    return gammaln(order + 1) - gammaln(term + 1) - left, gammasgn(order - term + 1)


def _sampled_fractional(rate: float, noise: float, whole: Curve) -> Curve:
    """Return the Gaussian curve at the fractional orders, given that at the whole ones.

    The two series of arXiv:1908.10530, section 3.3. Signs alternate from the order on;
    dp_accounting takes all as plus, which is a bound too, and a loose one for high rates.
    Where the series is slow or rounding eats the digits, the next whole order stands in:
    divergences grow with the order (van Erven and Harremoës 2014, theorem 3).
    """
    order = _FRACTIONAL[:, None]
    low = np.arange(float(_TERMS))
    high = order - low
    middle = noise**2 * np.log(1 / rate - 1) + 0.5
    log_rate, log_rest = np.log(rate), np.log1p(-rate)
    below = low * log_rate + high * log_rest + (low**2 - low) / (2 * noise**2)
    below += log_ndtr((middle - low) / noise)
    above = high * log_rate + low * log_rest + (high**2 - high) / (2 * noise**2)
    above += log_ndtr((high - middle) / noise)
    binomials, signs = _fractional_binomials()
    terms = binomials + np.logaddexp(below, above)
    largest = terms.max(axis=1, keepdims=True)
    moments = np.log((signs * np.exp(terms - largest)).sum(axis=1)) + largest[:, 0]
    usable = (terms[:, -1] < moments - _CONVERGED) & (moments > _LEAST_MOMENT)
    next_whole = whole[np.ceil(_FRACTIONAL).astype(np.int64) - 2]
    return np.where(usable, moments / (_FRACTIONAL - 1), next_whole)
