"""A run's differential privacy as the round loop sees it: what is asked of the clinics, what
the server itself adds, and what is written down.

Three cases behind one interface: no noise, noise at the clinics (``Shield``), and
noise of the server over whole clinics (``CentralShield``).
"""

import math
from dataclasses import replace

import torch
from flwr.app import Message, RecordDict

from fedpeft.adapters import AdapterSchema, AdapterState, WeightedMean
from fedpeft.config import LARGEST_DELTA, FederationSettings, PrivacySettings
from fedpeft.privacy.noise import GaussianNoise
from fedpeft.protocol import (
    ARRAYS,
    METRICS,
    NUM_EXAMPLES,
    TRAIN_NLL,
    TRAIN_TOKENS,
    SumTerms,
    array_record,
    metric_from,
    metric_record,
    state_from,
)
from fedpeft.protocol.privacy import ClinicPrivacy
from fedpeft.protocol.records import Metric
from fedpeft.protocol.sums import GRID_BITS, grid_limit, on_grid
from fedpeft.secagg import Quantiser
from fedpeft_server.clinic_level import ClinicLevel, multiplier_for
from fedpeft_server.collection import Collected
from fedpeft_server.privacy_record import PrivacyRecord

_SHORT = 1 - 1e-5
"""An update that a clinic cut to the clip is no shorter than this part of it, in float32."""


class Shield:
    """No noise, or noise that the clinics add themselves."""

    def __init__(self, settings: FederationSettings) -> None:
        self._settings = settings
        self._privacy = settings.privacy

    @property
    def least(self) -> int:
        """The clinics that a sum must have for its noise to be whole."""
        if self._privacy is None or not on_grid(self._privacy):
            return 0
        return self._privacy.honest_clinics or self._settings.rounds.minimum_clinics

    def asked(self) -> PrivacySettings | None:
        """Return what the next job asks of the clinics."""
        if self._privacy is None:
            return None
        return self._privacy.model_copy(
            update={"test_seed": None, "honest_clinics": self.least or None}
        )

    def terms(self, limit: float) -> SumTerms:
        """Return how coordinates are summed; ``limit`` is the range that the rounds suggest."""
        aggregation = self._settings.aggregation
        whole = on_grid(self._privacy)
        return SumTerms(
            confidentiality=aggregation.confidentiality,
            adversary=aggregation.adversary,
            bits=GRID_BITS if whole else aggregation.bits,
            limit=grid_limit() if whole else limit,
        )

    def release(self, collected: Collected) -> tuple[Collected, PrivacyRecord | None]:
        """Return the trained updates as a strategy may see them, and the round's record."""
        if self._privacy is None:
            return collected, None
        return collected, PrivacyRecord(clinics=collected.privacy)

    def follow(self, record: PrivacyRecord) -> None:
        """Take over what an earlier round left; of noise at the clinics nothing."""

    def caution(self, clinics: int) -> str:
        """Return a sentence on why noise over ``clinics`` clinics is of no use; "" if it is."""
        return ""


class CentralShield(Shield):
    """Noise of this server over whole clinics, with a clip that follows the updates."""

    def __init__(
        self, settings: FederationSettings, privacy: PrivacySettings, schema: AdapterSchema
    ) -> None:
        super().__init__(settings)
        self._schema = schema
        self._delta = privacy.delta or LARGEST_DELTA
        self._clip = privacy.clip
        self._rounds: dict[str, int] = {}
        noise = GaussianNoise.made(privacy.test_seed, "server")
        self._level = ClinicLevel(self._multiplier(privacy), privacy.target_quantile, noise)

    def _multiplier(self, privacy: PrivacySettings) -> float:
        if privacy.noise_multiplier != "auto":
            return privacy.noise_multiplier
        aim = privacy.epsilon or math.inf
        return multiplier_for(aim, self._delta, self._settings.rounds.count)

    def asked(self) -> PrivacySettings | None:
        """Return what the next job asks of the clinics, with this round's clip."""
        asked = super().asked()
        changes = {"clip": self._clip, "noise_multiplier": self._level.noise_multiplier}
        return asked and asked.model_copy(update=changes)

    def terms(self, limit: float) -> SumTerms:
        """Return how coordinates are summed: none is larger than the clip."""
        return super().terms(self._clip)

    def release(self, collected: Collected) -> tuple[Collected, PrivacyRecord | None]:
        """Fold the updates into one private mean, which stands for all clinics."""
        summed = self._settings.aggregation.confidentiality == "secagg"
        mean, weights, within = self._mean(collected, summed=summed)
        released = self._level.release(
            mean,
            clip=self._clip,
            weights=weights,
            within_clip=within,
            rounding=self._rounding() if summed else 0.0,
        )
        reply = self._reply(collected, released.mean)
        record = PrivacyRecord(
            clinics=self._spent(collected.participants),
            clip=self._clip,
            next_clip=released.next_clip,
            noise_to_signal=released.noise * math.sqrt(self._schema.numel) / self._clip,
        )
        return replace(collected, replies=(reply,)), record

    def _mean(self, collected: Collected, *, summed: bool) -> tuple[AdapterState, list[float], int]:
        """Return the weighted mean of the clipped updates, the weights, and how many were short."""
        mean, weights, within = WeightedMean(self._schema), [], 0
        for reply in collected.replies:
            update = state_from(reply.content, self._schema, "update", source="a clinic")
            weight = metric_from(reply.content, NUM_EXAMPLES)
            if not summed:
                # A clinic has clipped it already; this is for one that has not.
                norm = float(torch.linalg.vector_norm(update.values.double()))
                within += norm < self._clip * _SHORT
                factor = min(1.0, self._clip / norm) if norm else 1.0
                update = AdapterState(self._schema, update.values * factor)
            mean.add(update, weight)
            weights.append(weight)
        if summed:
            return mean.result(), [1.0] * len(collected.participants), collected.within_clip
        return mean.result(), weights, within

    def _rounding(self) -> float:
        """Return the part of the clip by which quantisation may lengthen an update."""
        centre = Quantiser(self._settings.aggregation.bits, self._clip).centre
        return math.sqrt(self._schema.numel) / centre

    def _reply(self, collected: Collected, mean: AdapterState) -> Message:
        contents = [reply.content for reply in collected.replies]
        names: tuple[Metric, ...] = (NUM_EXAMPLES, TRAIN_NLL, TRAIN_TOKENS)
        totals: dict[Metric, float] = {
            name: sum(metric_from(content, name) for content in contents) for name in names
        }
        content = RecordDict({METRICS: metric_record(totals), ARRAYS: array_record(mean, "update")})
        metadata = collected.replies[0].metadata
        return Message(content, metadata.dst_node_id, metadata.message_type)

    def _spent(self, participants: tuple[str, ...]) -> dict[str, ClinicPrivacy]:
        return {
            name: self._level.spent(self._rounds.get(name, 0) + 1, self._delta, self._clip)
            for name in participants
        }

    def follow(self, record: PrivacyRecord) -> None:
        """Go on with the clip and the losses of an earlier round."""
        self._clip = record.next_clip or self._clip
        self._rounds |= {name: loss.steps for name, loss in record.clinics.items()}

    def caution(self, clinics: int) -> str:
        """Say when the noise is larger than what the clinics could possibly teach."""
        # Before the first clinic has enrolled, the smallest federation that will run is meant.
        clinics = max(clinics, self._settings.rounds.minimum_clinics)
        ratio = self._level.noise_to_signal(clinics, self._schema.numel)
        if ratio < 1:
            return ""
        enough = math.ceil(clinics * ratio)
        return (
            f"clinic-level privacy over {clinics} clinics adds noise {ratio:.1f} times as large as "
            "the largest possible mean update, so the adapter will learn next to nothing; it "
            f'needs about {enough:,} clinics, a smaller adapter, or unit = "patient"'
        )


def shield_of(settings: FederationSettings, schema: AdapterSchema) -> Shield:
    """Return the shield that the settings ask for.

    Raises:
        PrivacyError: no noise reaches the epsilon that they name.
    """
    if settings.privacy is not None and settings.privacy.mechanism == "central":
        return CentralShield(settings, settings.privacy, schema)
    return Shield(settings)
