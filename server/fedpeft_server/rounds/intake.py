"""The way of a round's updates to the strategy: as they are, or as one private mean.

The mean of clinic-level privacy has its noise before a strategy sees it, so that whatever
a strategy does with it costs nothing more.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fedpeft.adapters import AdapterSchema, AdapterState, WeightedMean
from fedpeft.errors import AdapterError
from fedpeft.protocol.privacy import ClinicPrivacy
from fedpeft.secagg import Quantiser
from fedpeft_server.rounds.clinic_level import ClinicLevel
from fedpeft_server.rounds.collection import Collected
from fedpeft_server.rounds.privacy_record import PrivacyRecord
from fedpeft_strategies.strategy import Fold

_SHORT = 1 - 1e-5
"""An update that a clinic cut to the clip is no shorter than this part of it, in float32."""


class Intake:
    """Hands updates on; with ``noted``, clinics report what they lost, which is written down."""

    def __init__(self, fold: Fold, *, noted: bool) -> None:
        self._fold = fold
        self._noted = noted

    def add(self, update: AdapterState, weight: float) -> None:
        """Take one update.

        Raises:
            AdapterError: it cannot be used.
        """
        self._fold.add(update, weight)

    def close(self, collected: Collected) -> PrivacyRecord | None:
        """Bring everything to the strategy; return what it cost, None in a run without noise."""
        return PrivacyRecord(clinics=collected.privacy) if self._noted else None


@dataclass(frozen=True, slots=True)
class Rounding:
    """How the updates of a secure sum were quantised."""

    bits: int
    limit: float
    coordinates: int

    @property
    def part(self) -> float:
        """The part of the limit by which quantisation may lengthen an update."""
        return math.sqrt(self.coordinates) / Quantiser(self.bits, self.limit).centre


class CentralIntake(Intake):
    """Folds the updates into one private mean, which stands for all clinics."""

    def __init__(
        self,
        fold: Fold,
        part: AdapterSchema,
        level: ClinicLevel,
        clip: float,
        rounding: Rounding | None,
        spent: Callable[[tuple[str, ...]], dict[str, ClinicPrivacy]],
    ) -> None:
        """Use ``clip``; ``rounding`` is given if what comes is already the mean of a sum."""
        super().__init__(fold, noted=True)
        self._level, self._clip, self._rounding, self._spent = level, clip, rounding, spent
        self._mean = WeightedMean(part)
        self._weights: list[float] = []
        self._within = 0
        self._part = part

    def add(self, update: AdapterState, weight: float) -> None:
        """Take one update, cut to the clip."""
        if self._rounding is None:
            # A clinic has clipped it already; this is for one that has not.
            norm = float(torch.linalg.vector_norm(update.values, dtype=torch.float64))
            self._within += norm < self._clip * _SHORT
            factor = min(1.0, self._clip / norm) if norm else 1.0
            update = AdapterState(update.schema, update.values * factor)
        self._mean.add(update, weight)
        self._weights.append(weight)

    def close(self, collected: Collected) -> PrivacyRecord | None:
        """Add the noise and hand the mean on.

        Raises:
            AdapterError: no update came.
        """
        if not self._weights:
            raise AdapterError("the private mean of no updates is undefined")
        summed = self._rounding is not None
        released = self._level.release(
            self._mean.result(),
            clip=self._clip,
            weights=[1.0] * len(collected.participants) if summed else self._weights,
            within_clip=collected.within_clip if summed else self._within,
            rounding=self._rounding.part if self._rounding is not None else 0.0,
        )
        self._fold.add(released.mean, math.fsum(self._weights))
        return PrivacyRecord(
            clinics=self._spent(collected.participants),
            clip=self._clip,
            next_clip=released.next_clip,
            noise_to_signal=released.noise * math.sqrt(self._part.numel) / self._clip,
        )
