"""Differential privacy with a whole clinic as the unit: adaptive clip and central noise.

McMahan et al. 2018 (arXiv:1710.06963) with the clip of Andrew et al. 2021
(arXiv:1905.03871). Protects a clinic against everyone who sees the adapters, not
against this server, which adds the noise. Every mean is made private before a
strategy sees it, so that whatever a strategy does with it costs nothing more.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedpeft.adapters import AdapterState
from fedpeft.privacy.accounting import epsilon_of
from fedpeft.privacy.calibration import calibrated
from fedpeft.privacy.charge import Charge
from fedpeft.privacy.noise import GaussianNoise
from fedpeft.protocol.privacy import ClinicPrivacy

_CLIP_RATE = 0.2
"""The clip moves by at most this factor in a round (eta of Andrew et al.)."""


@dataclass(frozen=True, slots=True)
class Released:
    """A private mean: ``noise`` is the standard deviation that was added to a coordinate."""

    mean: AdapterState
    noise: float
    next_clip: float


class ClinicLevel:
    """The mechanism at one noise multiplier; clips come and go as arguments.

    Formal guarantee: the sequence of released means and clips is (epsilon, delta)-DP
    under taking one clinic out, its weight and presence being public: its update counts as
    zero then, and in the count of :meth:`release` as half a clinic. See :meth:`spent`.
    """

    def __init__(self, noise_multiplier: float, target_quantile: float, noise: GaussianNoise):
        self.noise_multiplier = noise_multiplier
        self._target = target_quantile
        self._noise = noise
        # Of the privacy a quarter goes to the count that steers the clip, at most.
        self._count_noise = noise_multiplier
        self._update_multiplier = noise_multiplier / math.sqrt(1 - 0.25)

    def sensitivity(self, clip: float, weights: Sequence[float], rounding: float) -> float:
        """Return the most that one clinic changes the weighted mean (L2).

        That is the largest share of the weights times the clip. The usual clip/n is too
        small by n times the largest share where weights differ. ``rounding`` is the part
        of the clip that quantisation may add.
        """
        return clip * (1 + rounding) * max(weights) / math.fsum(weights)

    def release(
        self,
        mean: AdapterState,
        *,
        clip: float,
        weights: Sequence[float],
        within_clip: int,
        rounding: float = 0.0,
    ) -> Released:
        """Return ``mean`` with noise, and the clip of the next round.

        ``within_clip`` counts the clinics whose update was within ``clip``; it is used
        with noise only: z_update = (z^-2 - (2 sigma_count)^-2)^-1/2, the count's
        sensitivity being 1/2 about its centre.
        """
        scale = self._update_multiplier * self.sensitivity(clip, weights, rounding)
        values = mean.values.clone()
        self._noise.add_to(values, scale)
        share = (within_clip + self._count_noise * float(self._noise.draw(1)[0])) / len(weights)
        next_clip = clip * math.exp(-_CLIP_RATE * (min(1.0, max(0.0, share)) - self._target))
        return Released(AdapterState(mean.schema, values), scale, next_clip)

    def noise_to_signal(self, clinics: int, coordinates: int) -> float:
        """Return the norm of the noise over that of the largest possible mean of ``clinics``."""
        return self._update_multiplier * math.sqrt(coordinates) / clinics

    def spent(self, rounds: int, delta: float, clip: float) -> ClinicPrivacy:
        """Return the loss of a clinic that took part in ``rounds`` rounds."""
        charge = Charge(noise="gaussian", noise_multiplier=self.noise_multiplier)
        found = epsilon_of({charge: rounds} if rounds else {}, delta)
        known = self._noise.reproducible  # noise that anyone can take away again is none
        return ClinicPrivacy(
            epsilon=None if known else found.epsilon,
            delta=delta,
            epsilon_rdp=None if known else found.epsilon_rdp,
            steps=rounds,
            noise_multiplier=self.noise_multiplier,
            clip=clip,
        )


def multiplier_for(epsilon: float, delta: float, rounds: int) -> float:
    """Return the noise multiplier with which ``rounds`` rounds cost ``epsilon``.

    There is no amplification: the server knows which clinics take part.

    Raises:
        PrivacyError: no noise is enough.
    """
    return calibrated(epsilon, delta, 1.0, rounds)
