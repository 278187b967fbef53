"""Exposure of a canary: how much easier than chance a model makes it to guess a secret.

Carlini et al. 2019, "The Secret Sharer" (arXiv:1802.08232): log2 of the number of
possible secrets, minus log2 of the rank of the true one when all are ordered by
their likelihood. Knows nothing of models: it is given negative log-likelihoods.
"""

import math

import numpy as np
import numpy.typing as npt
import torch

Floats = npt.NDArray[np.float64]

METHOD = "sampled rank; below all samples, the tail of a skew-normal distribution fitted to them"
_LARGEST_SKEWNESS = 0.99
_TAIL = np.arange(0.0, 12.0, 0.005)
"""Standard deviations below a point over which the tail is integrated."""


def exposure(secret: float, others: Floats, *, bits: float) -> float:
    """Return the exposure of a secret in bits, from 0 to ``bits``.

    The share of all possible secrets that are at least as likely as the true one is
    estimated from a sample of others. Where none of these is as likely, the sample
    only says that the exposure is log2(samples + 1) or more; the rest is read
    off a skew-normal distribution with the sample's mean, variance and skewness, as
    in section 4.3 of the paper.

    Args:
        secret: negative log-likelihood of the true secret, nats.
        others: the same of other random secrets in its place, float64, shape (samples,).
        bits: log2 of the number of possible secrets.
    """
    as_likely = int((others <= secret).sum())
    sampled = math.log2((len(others) + 1) / (as_likely + 1))
    if as_likely or len(others) < 3 or np.ptp(others) == 0:
        return min(bits, sampled)
    return min(bits, max(sampled, -_log_tail(secret, others) / math.log(2)))


def _log_tail(value: float, sample: Floats) -> float:
    """Return ln P[X <= value] of the skew-normal distribution that fits ``sample``.

    Fitted by moments, as that needs no iteration and so gives the same everywhere.
    """
    mean, deviation = float(sample.mean()), float(sample.std())
    skewness = float((((sample - mean) / deviation) ** 3).mean())
    skewness = math.copysign(min(abs(skewness), _LARGEST_SKEWNESS), skewness)
    share = abs(skewness) ** (2 / 3)
    lean = math.sqrt(math.pi / 2 * share / (share + ((4 - math.pi) / 2) ** (2 / 3)))
    lean = math.copysign(lean, skewness)
    scale = deviation / math.sqrt(1 - 2 * lean**2 / math.pi)
    place = mean - scale * lean * math.sqrt(2 / math.pi)
    shape = lean / math.sqrt(1 - lean**2)
    points = (value - place) / scale - _TAIL
    weights = torch.special.log_ndtr(torch.from_numpy(shape * points)).numpy()
    logs = math.log(2 / math.sqrt(2 * math.pi)) - points**2 / 2 + weights
    top = float(logs.max())
    heights = np.exp(logs - top)
    area = float((heights[:-1] + heights[1:]).sum()) / 2 * float(_TAIL[1])
    return min(0.0, top + math.log(area))
