"""How answers are collected: what each way of confidentiality gives the round loop.

Two ways stand beside this file: ``opened`` (the server opens each answer) and
``summed`` (it learns the sum only).
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, Protocol

from flwr.app import Array, Message
from pydantic import BaseModel, ConfigDict

from fedpeft.config import Confidentiality
from fedpeft.errors import FederationError
from fedpeft.protocol import CONTENT_KEY, JOB, Job, Payload, blob_of, job_from, raw
from fedpeft.protocol.privacy import PRIVACY, ClinicPrivacy, clinic_privacy
from fedpeft.sealing import seal_broadcast
from fedpeft_server.channel import Letter

Kind = Literal["train", "evaluate"]


class ConfidentialityRecord(BaseModel):
    """What the server could see in one round.

    ``threshold``, ``bits``, ``limit`` and ``clipped`` (coordinates of all clinics) are None
    where the server opened each update; ``limit`` is the range of this round and
    ``next_limit`` of the one after it, in rows times change of a coordinate.
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
class Collected:
    """What came of asking all clinics once.

    ``replies`` are for the strategy, each with an update and its sums: one for each
    clinic, or one for all. ``losses`` holds the validation loss of those clinics that
    the server may know, ``trouble`` a sentence if there is no result. ``privacy`` is what
    the clinics report of their losses, and ``within_clip`` counts the updates that
    clinic-level privacy left uncut.
    """

    participants: tuple[str, ...] = ()
    failed: dict[str, str] = field(default_factory=dict[str, str])
    replies: tuple[Message, ...] = ()
    losses: dict[str, float] = field(default_factory=dict[str, float])
    confidentiality: ConfidentialityRecord | None = None
    trouble: str = ""
    privacy: dict[str, ClinicPrivacy] = field(default_factory=dict[str, ClinicPrivacy])
    within_clip: int = 0


class Collector(Protocol):
    """One way to ask all clinics."""

    def collect(
        self, kind: Kind, number: int, attempt: int, messages: Iterable[Message], timeout_s: float
    ) -> Collected:
        """Deliver the strategy's ``messages`` in confidence and collect what is answered."""
        ...


@dataclass(frozen=True, slots=True)
class Order:
    """One of the strategy's messages: the job and the adapter's bytes for one node."""

    node: int
    job: Job
    adapter: bytes


def orders_of(messages: Iterable[Message]) -> list[Order]:
    """Read the strategy's messages.

    Raises:
        FederationError: a message carries no adapter.
    """
    orders: list[Order] = []
    for message in messages:
        adapter = blob_of(message.content)
        if adapter is None:
            raise FederationError("the strategy sends a clinic no adapter")
        orders.append(Order(message.metadata.dst_node_id, job_from(message.content), adapter))
    return orders


def privacy_of(name: str, payload: Payload, job: Job) -> dict[str, ClinicPrivacy]:
    """Return what a clinic reports of its privacy loss, by its name, if the job has it do so.

    Raises:
        AdapterError: it has to report and does not.
    """
    if job.privacy is None or job.privacy.mechanism == "central":
        return {}
    text = payload.fields.get(PRIVACY, "")
    return {name: clinic_privacy(str(text), source=f"clinic {name}")}


class Printer:
    """Turns orders into letters, encrypting each adapter once however many clinics get it."""

    def __init__(self) -> None:
        self._broadcasts: dict[bytes, tuple[Array, str]] = {}

    def letter(self, order: Order) -> Letter:
        """Return the letter for an order's clinic."""
        if order.adapter not in self._broadcasts:
            data, key = seal_broadcast(order.adapter)
            self._broadcasts[order.adapter] = raw(data), key.to_bytes().hex()
        broadcast, key = self._broadcasts[order.adapter]
        fields = {JOB: order.job.to_json(), CONTENT_KEY: key}
        return Letter(Payload({**fields}), broadcast)
