"""What the central site writes into its audit log, before it does it.

Stands between the round loop and the engine below it, so that no message to a clinic or
from one passes unseen. Knows sizes and hashes of messages, never what they hold. Must not
know how the log is kept.
"""

import contextlib
from collections.abc import Generator, Iterable, Mapping
from importlib import metadata
from pathlib import Path

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from fedpeft.audit_log import AuditLog, Kind, Value
from fedpeft.errors import FedpeftError
from fedpeft.privacy.ledger_chain import Anchor
from fedpeft.protocol.facts import claimed_context, message_facts
from fedpeft.sealing import Context, Identity, PublicIdentity, clinic_role
from fedpeft_server.link.link import Link
from fedpeft_server.link.wire_meter import WireMeter


class Trail:
    """Notes in the log of a site.

    Every method raises ``StorageError`` if it cannot be written, and ``AuditLogDamaged`` if
    something else wrote to the log: then what was to be noted must not be done.
    """

    def __init__(self, log: AuditLog) -> None:
        self._log = log
        self._asked: dict[str, Context] = {}

    @classmethod
    def open(cls, directory: Path, identity: Identity) -> "Trail":
        """Open or begin the log in ``directory``, signed by ``identity``.

        Raises:
            AuditLogDamaged: it was changed, cut off or removed.
            StorageError: it cannot be read or written.
        """
        return cls(AuditLog(directory, signer=identity))

    @property
    def repaired_bytes(self) -> int:
        """How much of a torn last line was cut away when the log was opened."""
        return self._log.repaired_bytes

    @property
    def end(self) -> Anchor:
        """Number and hash of the last entry."""
        return self._log.end

    @contextlib.contextmanager
    def session(self, federation: str, identity: PublicIdentity) -> Generator[None]:
        """Note start and stop of the program, each with a checkpoint, around the body."""
        about = {"version": metadata.version("fedpeft"), "federation": federation}
        about |= {"program": "fedpeft-server", "identity": identity.fingerprint}
        self._note("start", {**about, "name": "server"})
        self._log.checkpoint()
        try:
            yield
        except BaseException as error:
            # The log may be why it ends; the error that is under way says so.
            with contextlib.suppress(FedpeftError):
                self._stopped(_reason_of(error))
            raise
        self._stopped("finished")

    def sent(self, clinic: str, message: Message) -> None:
        """Note a message to a clinic, before it is handed to the engine."""
        context = claimed_context(message)
        facts = message_facts(message, context)
        if context is not None:
            # Each clinic is asked one thing at a time.
            self._asked[clinic] = context
        self._note("message-out", {"with": clinic_role(clinic), **facts})

    def heard(self, clinic: str, reply: Message) -> None:
        """Note an answer, or what the engine says in its place, before it is looked at."""
        context = (None if reply.has_error() else claimed_context(reply)) or self._asked.get(clinic)
        facts = message_facts(reply, context)
        self._note("message-in", {"with": clinic_role(clinic), **facts})

    def adapter(self, run: str, number: int, *, lineage: str, weights: str) -> None:
        """Note the adapter of a round by the SHA-256 of its lineage and of its weights."""
        about = {"run": run, "round": number, "lineage": lineage, "weights": weights}
        self._note("adapter", about)

    def _stopped(self, reason: str) -> None:
        self._note("stop", {"reason": reason})
        self._log.checkpoint()

    def _note(self, kind: Kind, about: Mapping[str, Value]) -> None:
        self._log.append(kind, about)


class RecordedGrid(Grid):
    """Flower's ``Grid`` over another one, with every message noted on its way."""

    def __init__(self, link: Link, trail: Trail) -> None:
        self._link = link
        self._grid = link.grid
        self._trail = trail

    def set_run(self, run: Run) -> None:
        """Hand over to the grid below."""
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        """The run of the grid below."""
        return self._grid.run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Return a message as the grid below builds it."""
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes of the grid below."""
        return self._grid.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages, each noted before."""
        return self._grid.push_messages(self._leaving(messages))

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return replies, each noted before."""
        return self._arriving(self._grid.pull_messages(message_ids))

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send messages and yield the replies, all noted before."""
        return self._arriving(self._grid.send_and_receive(self._leaving(messages), timeout=timeout))

    def _leaving(self, messages: Iterable[Message]) -> Generator[Message]:
        names = self._link.names()
        for message in messages:
            self._trail.sent(names[message.metadata.dst_node_id], message)
            yield message

    def _arriving(self, replies: Iterable[Message]) -> Generator[Message]:
        names = self._link.names()
        for reply in replies:
            if (name := names.get(self._link.node_of(reply))) is not None:
                self._trail.heard(name, reply)
            yield reply


class RecordedLink:
    """A link whose grid notes every message."""

    def __init__(self, link: Link, trail: Trail) -> None:
        self._link = link
        self._grid = RecordedGrid(link, trail)

    @property
    def grid(self) -> Grid:
        """The grid that notes."""
        return self._grid

    @property
    def meter(self) -> WireMeter:
        """What was measured on the wire so far."""
        return self._link.meter

    @property
    def run_id(self) -> int:
        """Flower's id of the run."""
        return self._link.run_id

    def names(self) -> dict[int, str]:
        """Return the names of all enrolled clinics by node id."""
        return self._link.names()

    def identities(self) -> dict[int, PublicIdentity]:
        """Return what the clinics enrolled with, by node id."""
        return self._link.identities()

    def successions(self) -> Mapping[str, tuple[bytes, ...]]:
        """Return how clinics came to their identities."""
        return self._link.successions()

    def node_of(self, reply: Message) -> int:
        """Return the node that ``reply`` is about."""
        return self._link.node_of(reply)


def _reason_of(error: BaseException) -> str:
    if isinstance(error, FedpeftError):
        return error.reason
    return FedpeftError.reason if isinstance(error, Exception) else "interrupted"
