"""What the server asks a clinic to do in one message, in words both sides validate."""

from pydantic import Field, ValidationError, model_validator

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

PROTOCOL_VERSION = 3


class SumTerms(Settings):
    """How updates are made confidential; a clinic compares it with what it demands."""

    confidentiality: Confidentiality
    adversary: Adversary
    bits: int = Field(ge=8, le=24)
    limit: float = Field(gt=0)
    """Public range of one weighted coordinate of one clinic."""


class Job(Settings):
    """One round's work. It carries no path, no code and no choice of data."""

    protocol: int = Field(default=PROTOCOL_VERSION, ge=PROTOCOL_VERSION, le=PROTOCOL_VERSION)
    federation: Name
    fingerprint: str = Field(pattern=r"^[0-9a-f]{64}$")
    quantization: Quantization
    adapter: AdapterSettings
    training: TrainingSettings
    aggregation: SumTerms
    privacy: PrivacySettings | None = None
    """With the clip of this round; a seed for tests never travels."""
    round: int = Field(ge=0)
    rounds: int = Field(ge=1)

    @model_validator(mode="after")
    def _round_is_one_of_the_run(self) -> "Job":
        if self.round > self.rounds:
            raise ValueError("the round is beyond the last one")
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
