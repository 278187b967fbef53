"""What a box writes into its audit log, before it does it.

Knows which facts of a message, decision or charge may stand there: numbers, hashes, names
of clinics and rules; never what a message holds, and no path. Must not know how the log
is kept.
"""

import contextlib
from collections.abc import Callable, Generator, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Self

from flwr.app import Message

from fedpeft.audit_log import AuditLog, Kind, Value
from fedpeft.errors import FedpeftError, KeyLocked
from fedpeft.protocol import Job
from fedpeft.protocol.facts import claimed_context, message_facts, place_facts
from fedpeft.sealing import SERVER, Context
from fedpeft.storage import explained
from fedpeft_client.box import AUDIT_FOLDER
from fedpeft_client.rounds.clinic import Clinic

if TYPE_CHECKING:
    from fedpeft_client.rounds.learning import Trained


class Trail:
    """Notes nothing: for the clinics of a simulation, which keep no log.

    Whatever a box notes, it does so before it goes on; see :class:`BoxTrail` for errors.
    """

    def received(self, message: Message) -> None:
        """Note a message of the server that has come, before it is opened."""

    def leaving(self, reply: Message) -> None:
        """Note an answer, before the first byte of it leaves."""

    def accepted(self, message: Message, context: Context) -> None:
        """Note that a job is within what this clinic allows, before it is begun."""

    def refused(self, asked: Message, error: FedpeftError) -> None:
        """Note that a message is not answered as asked; of the error only its rule."""

    def charged(self, context: Context, job: Job, trained: "Trained") -> None:
        """Note what a round of training has cost, before its result is made ready to leave."""

    def connection(self, event: str) -> None:
        """Note that the server can be reached (``connected``) or not (``disconnected``)."""


class BoxTrail(Trail):
    """Notes everything in the log of a box.

    Every method raises ``StorageError`` if it cannot be written, and ``AuditLogDamaged`` if
    something else wrote to the log: then what was to be noted must not be done.
    """

    def __init__(self, log: AuditLog, clinic: Clinic) -> None:
        """Note in ``log``, which is signed by the identity of ``clinic``."""
        self._log = log
        self._clinic = clinic
        self._asked: tuple[str, Context | None] = ("", None)

    @classmethod
    def open(cls, directory: Path, clinic: Clinic, tell: Callable[[str], None]) -> Self:
        """Open or begin the log in ``directory``; ``tell`` hears what had to be repaired.

        Raises:
            AuditLogDamaged: it was changed, cut off or removed.
            StorageError: it cannot be read or written.
        """
        log = AuditLog(directory, signer=clinic.membership.identity)
        if log.repaired_bytes:
            tell(
                f"the last line of the audit log {directory} was torn, as after a power cut, and "
                f"its {log.repaired_bytes} bytes were cut away: what it was to tell was not done"
            )
        return cls(log, clinic)

    def kept_by(self, clinic: Clinic) -> None:
        """Sign with the identity of ``clinic`` from now on; that it was renewed stands there."""
        self._log = AuditLog(self._log.directory, signer=clinic.membership.identity)
        self._clinic = clinic

    @contextlib.contextmanager
    def session(self) -> Generator[None]:
        """Note start and stop of the program, each with a checkpoint, around the body."""
        self._note(
            "start",
            {
                "program": "fedpeft-client",
                "version": metadata.version("fedpeft"),
                "federation": self._clinic.federation,
                "name": self._clinic.name,
                "identity": self._clinic.membership.identity.public.fingerprint,
            },
        )
        self._log.checkpoint()
        try:
            yield
        except BaseException as error:
            reason = _reason_of(error)
            # The log may be why it ends; the error that is under way says so.
            with contextlib.suppress(FedpeftError):
                self._stopped(reason)
            raise
        self._stopped("asked")

    def received(self, message: Message) -> None:
        """Note size and hash of what came, and the place that it claims."""
        context = claimed_context(message)
        # One message is answered at a time, so the last one is all that is needed.
        self._asked = message.metadata.message_id, context
        self._note("message-in", {"with": SERVER, **message_facts(message, context)})

    def leaving(self, reply: Message) -> None:
        """Note size and hash of what leaves, or the reason word that leaves instead."""
        context = self._context(reply.metadata.reply_to_message_id)
        self._note("message-out", {"with": SERVER, **message_facts(reply, context)})

    def accepted(self, message: Message, context: Context) -> None:
        """Note the job's place."""
        self._decided(message, context, "accepted", "policy")

    def refused(self, asked: Message, error: FedpeftError) -> None:
        """Note the rule, which is the reason that the server is told."""
        context = self._context(asked.metadata.message_id)
        self._decided(asked, context, "refused", error.reason)

    def charged(self, context: Context, job: Job, trained: "Trained") -> None:
        """Note the privacy that all rounds of this federation have cost until now."""
        privacy, spent = job.privacy, trained.privacy
        self._note(
            "charge",
            {
                "run": str(context.run),
                "round": context.round,
                "unit": privacy.unit if privacy else "record",
                "mechanism": privacy.mechanism if privacy else "none",
                "steps": spent and spent.steps,
                "epsilon": spent and spent.epsilon,
                "delta": spent and spent.delta,
            },
        )

    def connection(self, event: str) -> None:
        """Note the event."""
        self._note("connection", {"event": event})

    def _decided(self, asked: Message, context: Context | None, verdict: str, rule: str) -> None:
        facts = place_facts(asked, context)
        facts.pop("attempt", None)
        self._note("decision", {"with": SERVER, **facts, "verdict": verdict, "rule": rule})

    def _context(self, message_id: str) -> Context | None:
        known, context = self._asked
        return context if message_id == known else None

    def _stopped(self, reason: str) -> None:
        self._note("stop", {"reason": reason})
        self._log.checkpoint()

    def _note(self, kind: Kind, about: Mapping[str, Value]) -> None:
        self._log.append(kind, about)


@contextlib.contextmanager
def joining(box: Path, clinic: str, *, by_stick: bool = False) -> Generator[None]:
    """Note in the log of the new box in ``box`` that it joins, before the body sends anything.

    By stick it has joined only when its ticket comes, see :func:`joined`.

    Raises:
        AuditLogDamaged, StorageError: the log cannot be written, and nothing was sent.
    """
    with explained("make", box):
        box.mkdir(mode=0o700, parents=True, exist_ok=True)
    log = AuditLog(box / AUDIT_FOLDER)
    log.append("key", {"event": "joining", "name": clinic})
    yield
    if not by_stick:
        log.append("key", {"event": "joined", "name": clinic})


def joined(box: Path, clinic: str) -> None:
    """Note in the log of the box in ``box`` that its ticket has come.

    Raises:
        AuditLogDamaged, StorageError: the log cannot be written.
    """
    AuditLog(box / AUDIT_FOLDER).append("key", {"event": "joined", "name": clinic})


@contextlib.contextmanager
def unlocking(directory: Path) -> Generator[None]:
    """Note in the log in ``directory`` if the body cannot unlock the private identity.

    Raises:
        KeyLocked: as the body did.
        AuditLogDamaged, StorageError: the log cannot be written.
    """
    try:
        yield
    except KeyLocked:
        AuditLog(directory).append("key", {"event": "unlock-failed"})
        raise


def _reason_of(error: BaseException) -> str:
    if isinstance(error, FedpeftError):
        return error.reason
    return FedpeftError.reason if isinstance(error, Exception) else "interrupted"
