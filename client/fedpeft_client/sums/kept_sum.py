"""The secure sum that a clinic takes part in, kept on the disk between two of its steps.

On the network it outlives a restart, and with a stick each step is another process. Always
written before the answer of a step leaves: so no step ever gets two answers, whatever the
server asks and however the program stops. The last answer is kept too, for when the very same
request comes again after a kill. Encrypted; the secrets are removed with the last step.
"""

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import FedpeftError, StorageError
from fedpeft.protocol import Job
from fedpeft.sealing import Context
from fedpeft.secagg import Session
from fedpeft.secagg.kept_session import KeptSession
from fedpeft_client.rounds.clinic import Clinic
from fedpeft_client.vault import Vault

SCHEMA: Final = 1
_STATE: Final = "sum"
_VALUES: Final = "values"
_LENGTH: Final = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class Summand:
    """What a clinic adds: values float32 (coordinates,), their weight in rows, integers."""

    values: NDArray[np.float32] = field(repr=False)
    weight: int
    integers: Mapping[str, int]

    def to_bytes(self) -> bytes:
        """Return all of it; as secret as the clinic's update."""
        about = json.dumps({"weight": self.weight, "integers": dict(self.integers)}).encode()
        return _LENGTH.pack(len(about)) + about + self.values.astype("<f4").tobytes()

    @classmethod
    def from_bytes(cls, data: bytes) -> "Summand":
        """Read what :meth:`to_bytes` wrote, which the vault has authenticated."""
        (length,) = _LENGTH.unpack_from(data)
        at = _LENGTH.size
        about: dict[str, Any] = json.loads(data[at : at + length])
        values = np.frombuffer(data, "<f4", offset=at + length).astype(np.float32)
        return cls(values, about["weight"], about["integers"])


@dataclass(frozen=True, slots=True)
class Answered:
    """The answer to a step's request, of which ``asked`` is the context and the SHA-256."""

    asked: bytes
    answer: bytes = field(repr=False)

    @classmethod
    def to(cls, context: Context, data: bytes, answer: bytes) -> "Answered":
        """Return the answer to ``data``, asked in ``context``."""
        return cls(_asked(context, data), answer)

    def fits(self, context: Context, data: bytes) -> bool:
        """Say whether this is the answer to ``data``, asked in ``context``."""
        return self.asked == _asked(context, data)


def _asked(context: Context, data: bytes) -> bytes:
    place = context.to_bytes()
    return _LENGTH.pack(len(place)) + place + hashlib.sha256(data).digest()


def _answered(about: Mapping[str, Any], answer: bytes) -> Answered | None:
    return Answered(bytes.fromhex(about["asked"]), answer) if about.get("asked") else None


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptSum:
    """A sum between two steps; ``summand`` is None once it was masked.

    ``answered`` is the last step's answer.
    """

    context: Context
    session: Session
    job: Job
    steps: KeptSession = field(repr=False)
    summand: Summand | None = field(repr=False)
    answered: Answered | None = field(default=None, repr=False)


class SumFolder:
    """The present sum of ``clinic``, which must have a folder for it."""

    def __init__(self, clinic: Clinic) -> None:
        if clinic.sums_directory is None:
            raise ValueError("this clinic keeps no sums")
        self._vault = Vault(clinic.sums_directory, clinic.membership.identity)

    def begin(self, kept: KeptSum) -> None:
        """Keep a sum that begins.

        Raises:
            StorageError: it cannot be written; its first answer must not leave.
        """
        if kept.summand is not None:
            self._vault.write(_VALUES, kept.summand.to_bytes())
        self.go_on(kept)

    def go_on(self, kept: KeptSum) -> None:
        """Keep how far the sum has come, and the answer with which it came there, as one file.

        Raises:
            StorageError: it cannot be written; the answer must not leave.
        """
        session = kept.session
        document = {
            "context": kept.context.to_bytes().hex(),
            "kind": session.kind,
            "model": session.model.hex(),
            "job": kept.job.to_json(),
            "steps": kept.steps.to_bytes().decode(),
        }
        self._write(document, kept.answered)
        if kept.summand is None:
            self._remove(_VALUES)

    def over(self, answered: Answered | None) -> None:
        """Forget the secrets of a sum that was opened, and keep the last answer.

        Raises:
            StorageError: it cannot be written; the answer must not leave.
        """
        self._write(None, answered)
        self._remove(_VALUES)

    def _write(self, document: dict[str, str] | None, answered: Answered | None) -> None:
        asked = answered.asked.hex() if answered else ""
        about = json.dumps({"schema": SCHEMA, "sum": document, "asked": asked}).encode()
        answer = answered.answer if answered else b""
        self._vault.write(_STATE, _LENGTH.pack(len(about)) + about + answer)

    def last_answer(self) -> Answered | None:
        """Return the last answer; None: there is none that this box can read."""
        return _answered(*self._read())

    def _read(self) -> tuple[dict[str, Any], bytes]:
        if _STATE not in self._vault.names():
            return {}, b""
        try:
            data = self._vault.read(_STATE)
            (length,) = _LENGTH.unpack_from(data)
            end = _LENGTH.size + length
            about: dict[str, Any] = json.loads(data[_LENGTH.size : end])
        except (StorageError, ValueError, struct.error):
            return {}, b""  # of another release or identity: it counts as a sum never begun
        return (about, data[end:]) if about.get("schema") == SCHEMA else ({}, b"")

    def read(self) -> KeptSum | None:
        """Return what is kept; None: nothing that this box can go on with."""
        about, answer = self._read()
        document: Any = about.get("sum")
        if document is None:
            return None
        names = self._vault.names()
        try:
            context = Context.from_bytes(bytes.fromhex(document["context"]))
            return KeptSum(
                context=context,
                session=Session(
                    federation=context.federation,
                    run=context.run,
                    round=context.round,
                    attempt=context.attempt,
                    kind=document["kind"],
                    model=bytes.fromhex(document["model"]),
                ),
                job=Job.from_json(document["job"]),
                steps=KeptSession.from_bytes(document["steps"].encode()),
                summand=Summand.from_bytes(self._vault.read(_VALUES)) if _VALUES in names else None,
                answered=_answered(about, answer),
            )
        except (FedpeftError, ValueError, KeyError, TypeError):
            return None  # likewise

    def clear(self) -> None:
        """Forget the sum, so that a power cut does not bring it back.

        Raises:
            StorageError: the disk is read-only.
        """
        self._remove(_STATE, _VALUES)

    def _remove(self, *names: str) -> None:
        there = self._vault.names()
        for name in names:
            if name in there:
                self._vault.remove(name)
