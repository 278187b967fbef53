"""What the server asks a clinic to do in one message, in words both sides validate."""

from typing import Annotated, Literal

from pydantic import Field, ValidationError, model_validator

from fedpeft.adapters import Factors
from fedpeft.config import (
    AdapterSettings,
    Adversary,
    Confidentiality,
    Name,
    PrivacySettings,
    Quantization,
    Settings,
    TrainingSettings,
)
from fedpeft.errors import ConfigError

PROTOCOL_VERSION = 4


class SumTerms(Settings):
    """How updates are made confidential; a clinic compares it with what it demands."""

    confidentiality: Confidentiality
    adversary: Adversary
    bits: int = Field(ge=8, le=24)
    limit: float = Field(gt=0)
    """Public range of one weighted coordinate of one clinic."""


class RankTerms(Settings):
    """How clinics of different ranks take part in one round.

    ``of`` holds each clinic's rank by its name, and ``others`` that of clinics which are
    not named. Everybody sees it, so that a clinic can count who trains a column with it.
    """

    rule: Literal["nested", "truncated", "stacked"]
    """``nested``: over the rest of the adapter, frozen. Else: of the first columns alone."""
    of: dict[Name, Annotated[int, Field(ge=1)]]
    others: int = Field(ge=1)
    alike: bool = False
    """Clinics count the same, whatever their rows: where fewer than three have a rank, the
    weights that are summed for each rank would show their rows."""

    def rank(self, clinic: str) -> int:
        """Return the rank at which ``clinic`` takes part."""
        return self.of.get(clinic, self.others)


class Job(Settings):
    """One round's work. It carries no path, no code and no choice of data."""

    protocol: int = Field(default=PROTOCOL_VERSION, ge=PROTOCOL_VERSION, le=PROTOCOL_VERSION)
    federation: Name
    run: str = Field(pattern=r"^[0-9a-f]{32}$")
    """Tells the run from all others, also after a restart of the server."""
    fingerprint: str = Field(pattern=r"^[0-9a-f]{64}$")
    quantization: Quantization
    adapter: AdapterSettings
    training: TrainingSettings
    aggregation: SumTerms
    privacy: PrivacySettings | None = None
    """With the clip of this round; a seed for tests never travels."""
    trains: Factors = "AB"
    """The factors to train; the others stay as they are."""
    sends: Factors = "AB"
    """Those of them that leave the clinic; what it trains and does not send, it keeps."""
    ranks: RankTerms | None = None
    """None: everybody takes part at ``adapter.rank``."""
    base_change: tuple[Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")], ...] = ()
    """SHA-256 of the products to be added to the base model, in order (see parcel.py)."""
    asks_verdict: bool = False
    """Whether the server would like to know if the clinic takes the adapter into use."""
    round: int = Field(ge=0)
    rounds: int = Field(ge=1)

    @model_validator(mode="after")
    def _round_is_one_of_the_run(self) -> "Job":
        if self.round > self.rounds:
            raise ValueError("the round is beyond the last one")
        return self

    @model_validator(mode="after")
    def _what_is_sent_was_trained(self) -> "Job":
        if not set(self.sends) <= set(self.trains):
            raise ValueError("a factor is to be sent that is not trained")
        return self

    @model_validator(mode="after")
    def _ranks_are_parts_of_the_adapter(self) -> "Job":
        if self.ranks and max((self.ranks.others, *self.ranks.of.values())) > self.adapter.rank:
            raise ValueError("a clinic's rank is beyond the adapter's")
        return self

    def to_json(self) -> str:
        """Return the job as JSON text."""
        return self.model_dump_json()

    @classmethod
    def from_json(cls, text: str) -> "Job":
        """Read a job.

        Raises:
            ConfigError: it is not a job of this protocol version.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            where = ".".join(str(part) for part in error.errors()[0]["loc"])
            raise ConfigError(
                f"the server's job is not understood (at {where or 'its root'}); install the same "
                "fedpeft release on both sides"
            ) from None
