"""Membership inference: how well scores tell records that were trained on from others.

The attacks are thresholds on the loss (Yeom et al. 2018, arXiv:1709.01604) and on
the loss minus that of a reference model (calibration: Watson et al. 2022,
arXiv:2111.08440), judged as Carlini et al. 2022 (arXiv:2112.03570) ask. Knows
nothing of models or files.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

CONFIDENCE = 0.95
FALSE_POSITIVE_RATE = 0.01


@dataclass(frozen=True, slots=True)
class Membership:
    """One attack: area under the ROC curve, its interval, and the rate at few false alarms.

    ``auc`` (0 to 1) is the chance that a member scores higher than a non-member,
    ties counted half; ``interval`` its 95 % interval. ``tpr`` is the share of
    members found while at most 1 % of the non-members are taken for members.
    ``roc`` are the corners of the curve, (false, true) positive rates from (0, 0) to (1, 1).
    """

    auc: float
    interval: tuple[float, float]
    tpr: float
    roc: tuple[tuple[float, float], ...]


def measure(scores: Floats, member: npt.NDArray[np.bool_], units: Integers) -> Membership:
    """Judge an attack.

    Args:
        scores: float64, shape (records,): the higher, the more a record seems a member.
        member: bool, shape (records,), with at least one of each.
        units: int64, shape (records,): the patient of each record. All records of one are
            members, or none is.
    """
    false, true = _curve(scores, member)
    inside, outside = scores[member], scores[~member]
    # For each record, the share of the other side that it beats.
    beaten = _shares_below(inside, outside)
    unbeaten = 1 - _shares_below(outside, inside)
    auc = float(beaten.mean())
    variance = _variance(beaten, units[member], auc) + _variance(unbeaten, units[~member], auc)
    reach = NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * math.sqrt(variance)
    return Membership(
        auc=auc,
        interval=(max(0.0, auc - reach), min(1.0, auc + reach)),
        tpr=float(true[false <= FALSE_POSITIVE_RATE].max()),
        roc=_corners(false, true),
    )


def _curve(scores: Floats, member: npt.NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """Return false and true positive rates over all thresholds, from none to all."""
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
    true = np.cumsum(member[order])[ends] / member.sum()
    false = np.cumsum(~member[order])[ends] / (~member).sum()
    return np.insert(false, 0, 0.0), np.insert(true, 0, 0.0)


def _shares_below(scores: Floats, others: Floats) -> Floats:
    ordered = np.sort(others)
    below = np.searchsorted(ordered, scores, side="left")
    up_to = np.searchsorted(ordered, scores, side="right")
    return (below + up_to) / (2 * len(others))


def _variance(shares: Floats, units: Integers, auc: float) -> float:
    """Return one side's part of the variance of the AUC.

    DeLong et al. 1988, with records of one patient taken together as in Obuchowski
    1997 (Biometrics 53, 567): they resemble each other, so they count for less.
    """
    _, index = np.unique(units, return_inverse=True)
    sums = np.bincount(index, weights=shares - auc)
    if len(sums) < 2:
        return 1.0
    return float(len(sums) / (len(sums) - 1) * (sums**2).sum() / len(shares) ** 2)


def _corners(false: Floats, true: Floats) -> tuple[tuple[float, float], ...]:
    """Leave out the points at which the curve goes straight on."""
    keep = np.ones(len(false), dtype=np.bool_)
    rise, run = np.diff(true), np.diff(false)
    keep[1:-1] = ~np.isclose(rise[:-1] * run[1:], rise[1:] * run[:-1], rtol=0, atol=1e-12)
    return tuple(zip(false[keep].tolist(), true[keep].tolist(), strict=True))
