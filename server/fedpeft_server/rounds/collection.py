"""How answers are collected: what each way of confidentiality gives the round loop.

Two ways stand beside this file: ``opened`` (the server opens each answer) and
``summed`` (it learns the sum only).
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Literal, Protocol

from pydantic import BaseModel, ConfigDict

from fedpeft.adapters import AdapterState
from fedpeft.config import Confidentiality
from fedpeft.errors import AdapterError
from fedpeft.protocol import MAX_RANK, Job, Payload, RankTerms
from fedpeft.protocol.privacy import PRIVACY, ClinicPrivacy, clinic_privacy
from fedpeft_server.rounds.delivery import Order

Kind = Literal["train", "evaluate"]
Sink = Callable[[AdapterState, float], None]
"""Takes an update and its weight, as it arrives; raises a FedpeftError if it cannot be used."""


class ConfidentialityRecord(BaseModel):
    """What the server could see in one round.

    ``threshold``, ``bits``, ``limit`` and ``clipped`` (coordinates of all clinics) are None
    where the server opened each update; ``limit`` is the range of this round and
    ``next_limit`` of the next one like it, in rows times change of a coordinate.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    mode: Confidentiality
    threshold: int | None
    survivors: int
    bits: int | None
    wire_bytes_per_coordinate: float | None
    limit: float | None = None
    clipped: int | None = None
    next_limit: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sums:
    """What all answers together report: training rows, and loss (nats) over target tokens.

    Of ``verdicts`` clinics that tell, ``accepted`` have taken the adapter into use.
    """

    rows: int = 0
    nll: float = 0.0
    tokens: int = 0
    verdicts: int = 0
    accepted: int = 0

    @property
    def loss(self) -> float | None:
        """The loss in nats a token; None where no tokens were reported."""
        return self.nll / self.tokens if self.tokens else None

    def plus(self, other: "Sums") -> "Sums":
        """Return both together."""
        return Sums(
            rows=self.rows + other.rows,
            nll=self.nll + other.nll,
            tokens=self.tokens + other.tokens,
            verdicts=self.verdicts + other.verdicts,
            accepted=self.accepted + other.accepted,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """What came of asking all clinics once.

    ``losses`` holds the validation loss of those clinics that the server may know,
    ``trouble`` a sentence if there is no result. ``privacy`` is what the clinics report of
    their losses, ``within_clip`` counts the updates that clinic-level privacy left uncut,
    ``ranks`` is at which ranks they took part, and ``max_ranks`` which they can train.
    """

    participants: tuple[str, ...] = ()
    failed: dict[str, str] = field(default_factory=dict[str, str])
    sums: Sums = Sums()
    losses: dict[str, float] = field(default_factory=dict[str, float])
    confidentiality: ConfidentialityRecord | None = None
    trouble: str = ""
    privacy: dict[str, ClinicPrivacy] = field(default_factory=dict[str, ClinicPrivacy])
    within_clip: int = 0
    max_ranks: dict[str, int] = field(default_factory=dict[str, int])
    ranks: RankTerms | None = None


class Collector(Protocol):
    """One way to ask all clinics."""

    def collect(
        self,
        kind: Kind,
        number: int,
        attempt: int,
        order: Order,
        nodes: Collection[int],
        sink: Sink,
    ) -> Collected:
        """Ask ``nodes`` in confidence, and hand updates to ``sink`` as they arrive."""
        ...


def privacy_of(name: str, payload: Payload, job: Job) -> dict[str, ClinicPrivacy]:
    """Return what a clinic reports of its privacy loss, by its name, if the job has it do so.

    Raises:
        AdapterError: it has to report and does not.
    """
    if job.privacy is None or job.privacy.mechanism == "central":
        return {}
    text = payload.fields.get(PRIVACY, "")
    return {name: clinic_privacy(str(text), source=f"clinic {name}")}


def max_rank_of(name: str, payload: Payload) -> dict[str, int]:
    """Return the largest rank that a clinic says it trains, by its name.

    Raises:
        AdapterError: it says none.
    """
    rank = payload.fields.get(MAX_RANK)
    if not isinstance(rank, int) or rank < 1:
        raise AdapterError(f"clinic {name} reports no usable largest rank; its answer is not used")
    return {name: rank}
