"""A run's differential privacy as the round loop sees it: what is asked of the clinics, what
the server itself adds, and what is written down.

Three cases behind one interface: no noise, noise at the clinics (``Shield``), and
noise of the server over whole clinics (``CentralShield``). Updates come to the strategy
through an :class:`fedpeft_server.rounds.intake.Intake`.
"""

import math

from fedpeft.adapters import AdapterSchema
from fedpeft.config import LARGEST_DELTA, FederationSettings, PrivacySettings
from fedpeft.privacy.noise import GaussianNoise
from fedpeft.protocol import SumTerms
from fedpeft.protocol.privacy import ClinicPrivacy
from fedpeft.protocol.sums import GRID_BITS, grid_limit, on_grid
from fedpeft_server.rounds.clinic_level import ClinicLevel, multiplier_for
from fedpeft_server.rounds.intake import CentralIntake, Intake, Rounding
from fedpeft_server.rounds.privacy_record import PrivacyRecord
from fedpeft_strategies.strategy import Fold


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

    def intake(self, fold: Fold, part: AdapterSchema) -> Intake:
        """Return the way by which a round's updates, of schema ``part``, come to ``fold``."""
        return Intake(fold, noted=self._privacy is not None)

    def follow(self, record: PrivacyRecord) -> None:
        """Take over what an earlier round left; of noise at the clinics nothing."""

    def caution(self, clinics: int) -> str:
        """Return a sentence on why noise over ``clinics`` clinics is of no use; "" if it is."""
        return ""


class CentralShield(Shield):
    """Noise of this server over whole clinics, with a clip that follows the updates."""

    def __init__(
        self, settings: FederationSettings, privacy: PrivacySettings, coordinates: int
    ) -> None:
        super().__init__(settings)
        self._coordinates = coordinates
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

    def intake(self, fold: Fold, part: AdapterSchema) -> Intake:
        """Return the way on which the updates become one private mean."""
        summed = self._settings.aggregation.confidentiality == "secagg"
        bits = self._settings.aggregation.bits
        rounding = Rounding(bits, self._clip, part.numel) if summed else None
        return CentralIntake(fold, part, self._level, self._clip, rounding, self._spent)

    def _spent(self, participants: tuple[str, ...]) -> dict[str, ClinicPrivacy]:
        """Return what each clinic of a round will have lost."""
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
        ratio = self._level.noise_to_signal(clinics, self._coordinates)
        if ratio < 1:
            return ""
        enough = math.ceil(clinics * ratio)
        return (
            f"clinic-level privacy over {clinics} clinics adds noise {ratio:.1f} times as large as "
            "the largest possible mean update, so the adapter will learn next to nothing; it "
            f'needs about {enough:,} clinics, a smaller adapter, or unit = "patient"'
        )


def shield_of(settings: FederationSettings, coordinates: int) -> Shield:
    """Return the shield that the settings ask for; ``coordinates`` are those of an update.

    Raises:
        PrivacyError: no noise reaches the epsilon that they name.
    """
    if settings.privacy is not None and settings.privacy.mechanism == "central":
        return CentralShield(settings, settings.privacy, coordinates)
    return Shield(settings)
