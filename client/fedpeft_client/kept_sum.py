"""The secure sum that a clinic takes part in, kept on the disk between two of its steps.

On the network it outlives a restart, and with a stick each step is another process. Always
written before the answer of a step leaves: so no step is ever answered twice, whatever the
server asks and however the program stops. Encrypted; removed with the last step.
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import FedpeftError
from fedpeft.protocol import Job
from fedpeft.sealing import Context
from fedpeft.secagg import Session
from fedpeft.secagg.kept_session import KeptSession
from fedpeft_client.clinic import Clinic
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


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptSum:
    """A sum between two steps; ``summand`` is None once it was masked."""

    context: Context
    session: Session
    job: Job
    steps: KeptSession = field(repr=False)
    summand: Summand | None = field(repr=False)


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
        """Keep how far the sum has come.

        Raises:
            StorageError: it cannot be written; the answer must not leave.
        """
        session = kept.session
        document = {
            "schema": SCHEMA,
            "context": kept.context.to_bytes().hex(),
            "kind": session.kind,
            "model": session.model.hex(),
            "job": kept.job.to_json(),
            "steps": kept.steps.to_bytes().decode(),
        }
        self._vault.write(_STATE, json.dumps(document).encode())
        if kept.summand is None:
            self._remove(_VALUES)

    def read(self) -> KeptSum | None:
        """Return what is kept; None: nothing that this box can go on with."""
        names = self._vault.names()
        if _STATE not in names:
            return None
        try:
            document: Any = json.loads(self._vault.read(_STATE))
            if document["schema"] != SCHEMA:
                return None
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
            )
        except (FedpeftError, ValueError, KeyError, TypeError):
            return None  # of another release or identity: it counts as a sum never begun

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
