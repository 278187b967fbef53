"""What made an adapter, signed by the server: ``lineage.json`` beside its files.

Each names the one that it grew from by its SHA-256, so one signature vouches for all of
them. The format is specified in docs/spec/lineage.md. Must not know directories.
"""

import hashlib
import json
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fedpeft.config import Confidentiality, Name, PrivacySettings, Quantization
from fedpeft.errors import LineageRefused, SealingError
from fedpeft.sealing import Identity, PublicIdentity
from fedpeft.sealing.identity import verify

LINEAGE_FILE: Final = "lineage.json"
LINEAGE: Final = "lineage"
"""Field of a message that brings an adapter: the file, as text."""
_DOMAIN: Final = b"fedpeft lineage, version 1\x00"
LARGEST_BYTES: Final = 1 << 20

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Rounds = Annotated[str, Field(pattern=r"^(\d{1,6}(-\d{1,6})?(,\d{1,6}(-\d{1,6})?)*)?$")]
"""Ascending rounds as ranges: ``1-3,5``; empty for none."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)


class Weights(_Part):
    """The adapter's files: SHA-256 of ``adapter_model.safetensors``, and what scales them."""

    sha256: Sha256
    rank: int = Field(ge=1)
    alpha: float = Field(gt=0)


class Base(_Part):
    """The base model that the adapter belongs to."""

    fingerprint: Sha256
    quantization: Quantization


class Parent(_Part):
    """The adapter of the round before: SHA-256 of its lineage file and of its weights.

    ``lineage`` is None where a release before lineages made it.
    """

    round: int = Field(ge=0)
    lineage: Sha256 | None
    weights: Sha256


class Contributor(_Part):
    """A clinic: the fingerprint of its identity, and the rounds that used its update.

    ``fingerprint`` is None where only a release before lineages has known the clinic.
    """

    fingerprint: str | None = Field(pattern=r"^([0-9a-f]{4}-){7}[0-9a-f]{4}$")
    rounds: Rounds


class Spent(_Part):
    """The largest loss of a clinic over all rounds, as reported; ``epsilon`` None: no bound.

    No clinic is named: with the terms one could work out how many people its records are of.
    """

    epsilon: float | None = Field(ge=0)
    delta: float = Field(gt=0, lt=1)


class Protection(_Part):
    """The terms of differential privacy, and what they have cost; ``spent`` None: nothing yet."""

    unit: str
    mechanism: str
    clip: float
    noise_multiplier: float | Literal["auto"]
    epsilon: float | None
    exact_losses: bool
    spent: Spent | None

    @classmethod
    def of(cls, terms: PrivacySettings, spent: Spent | None) -> Self:
        """Return the terms of a federation."""
        return cls(
            unit=terms.unit,
            mechanism=terms.mechanism,
            clip=terms.clip,
            noise_multiplier=terms.noise_multiplier,
            epsilon=terms.epsilon,
            exact_losses=terms.exact_losses,
            spent=spent,
        )


class LogEnd(_Part):
    """The end of the server's audit log when the lineage was signed."""

    seq: int = Field(ge=1)
    hash: Sha256


class Lineage(_Part):
    """What made one adapter.

    ``clinics`` are all whose updates are in it, over all rounds; who made this round's is
    in :meth:`of_round`. Under ``secagg`` those are the survivors of the sum. ``settings``
    is the SHA-256 of the federation's settings, ``log`` None for a simulation.
    """

    version: Literal[1] = Field(default=1, alias="schema")
    federation: Name
    run: str = Field(pattern=r"^[0-9a-f]{32}$")
    round: int = Field(ge=0)
    time: str = Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00$")
    base: Base
    weights: Weights
    parent: Parent | None
    clinics: dict[Name, Contributor]
    strategy: Name
    mode: Confidentiality
    privacy: Protection | None
    settings: Sha256
    log: LogEnd | None

    @model_validator(mode="after")
    def _has_a_parent_from_round_one_on(self) -> "Lineage":
        if (self.parent is None) != (self.round == 0):
            raise ValueError("only round 0 has no parent")
        if self.parent is not None and self.parent.round != self.round - 1:
            raise ValueError("the parent is not the round before")
        return self

    def of_round(self) -> list[str]:
        """Return the clinics whose updates made the round's adapter from its parent."""
        return [name for name, one in self.clinics.items() if self.round in rounds_in(one.rounds)]


class SignedLineage(BaseModel):
    """A lineage with the fingerprint and signature of a server; see :meth:`require_signed`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    lineage: Lineage
    signer: str = Field(pattern=r"^([0-9a-f]{4}-){7}[0-9a-f]{4}$")
    signature: str = Field(pattern=r"^[0-9a-f]{128}$")

    def to_bytes(self) -> bytes:
        """Return the one way to write the file."""
        return _encoded(
            {
                "lineage": self.lineage.model_dump(mode="json", by_alias=True),
                "signer": self.signer,
                "signature": self.signature,
            }
        )

    @property
    def digest(self) -> str:
        """SHA-256 of the file, hex."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def require_signed(self, server: PublicIdentity) -> None:
        """Check the signature.

        Raises:
            LineageRefused: another identity signed it, or it was changed.
        """
        if self.signer != server.fingerprint:
            raise LineageRefused(
                f"the lineage was signed by {self.signer} and this federation's server is "
                f"{server.fingerprint}: do not use the adapter, unless the central site confirms "
                "by telephone that the first was its identity (then give it as --server-identity)"
            )
        try:
            verify(
                server.signing_bytes,
                bytes.fromhex(self.signature),
                _statement(self.lineage),
                source="the lineage",
            )
        except SealingError:
            raise LineageRefused(
                "the lineage was changed after the server had signed it: do not use the adapter; "
                "ask the central site for a new copy"
            ) from None


def sign(lineage: Lineage, server: Identity) -> SignedLineage:
    """Return ``lineage`` signed by ``server``."""
    return SignedLineage(
        lineage=lineage,
        signer=server.public.fingerprint,
        signature=server.sign(_statement(lineage)).hex(),
    )


def read_lineage(data: bytes, *, source: str) -> SignedLineage:
    """Read a lineage file; ``source`` names it. The signature is not checked.

    Raises:
        LineageRefused: it is no lineage of this release, or not in its one way of writing.
    """
    try:
        found = SignedLineage.model_validate_json(data)
    except ValidationError:
        found = None
    if found is None or len(data) > LARGEST_BYTES or found.to_bytes() != data:
        raise LineageRefused(
            f"{source} is no lineage of this release, or was changed: do not use the adapter; ask "
            "the central site for a new copy"
        )
    return found


def rounds_in(text: str) -> set[int]:
    """Return the rounds that ranges such as ``1-3,5`` name."""
    ends = [part.partition("-") for part in text.split(",") if part]
    return {
        number for first, _, last in ends for number in range(int(first), int(last or first) + 1)
    }


def with_round(text: str, number: int) -> str:
    """Return the ranges with one more round, the latest of all."""
    head, comma, last = text.rpartition(",")
    first, _, end = last.partition("-")
    if not last or int(end or first) != number - 1:
        return f"{text},{number}" if text else str(number)
    return f"{head}{comma}{first}-{number}"


def _statement(lineage: Lineage) -> bytes:
    return _DOMAIN + _encoded(lineage.model_dump(mode="json", by_alias=True))


def _encoded(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()
