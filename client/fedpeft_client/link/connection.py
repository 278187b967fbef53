"""The clinic's side of the network link: fetch a message, answer it, for ever.

A fixed client: it runs the app that is installed here and nothing that the
server sends, answers only the message types it was told to, and treats every
outage as passing. It never asks for Flower's app bundles.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Literal

from flwr.app import Context, Message, Metadata, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.constant import TaskType
from flwr.supercore.run import Run

from fedpeft.errors import AdapterNotHeld, Interrupted, PolicyRefused
from fedpeft.flower_pin import FAB_ID, quiet_flower_log, require_pinned_flower
from fedpeft.protocol import MESSAGE_TYPES
from fedpeft.secagg import STAGES
from fedpeft_client.limits.traffic import TrafficMeter
from fedpeft_client.link.fleet import Clock, FleetClient, load_key, open_http, read_ca
from fedpeft_client.link.patient_calls import MessageLost, PatientCalls, RunEnded, Stopped
from fedpeft_client.link.session import Session
from fedpeft_client.link.standing import Standing
from fedpeft_client.rounds.answering import Application, answer, refusal
from fedpeft_client.trail import Trail

log: Final = logging.getLogger(__name__)

# Soon after a message the next one is likely; a waiting clinic asks less often.
_BUSY_S: Final = 60.0
_LOST_PAUSE_S: Final = 1.0
# With the day's bytes used up, asking has only to find out that the day is over.
_SPENT_S: Final = 30.0
_WAITING: Final = (
    "the server still counts this clinic as online: another process uses its key, or one "
    "ended without notice less than a minute ago"
)


@dataclass(frozen=True, kw_only=True)
class ConnectionSettings:
    """How this clinic connects and what it lets the server ask.

    ``server`` is ``host:port``; ``key`` and ``ca`` are the files that joining
    made. ``node_config`` is handed to the app as its context's node_config. ``traffic``
    counts what passes against a daily limit, and is closed at the end.
    """

    server: str
    key: Path
    ca: Path
    message_types: frozenset[str] = MESSAGE_TYPES
    max_payload_bytes: int = 1 << 30
    traffic: TrafficMeter | None = None
    poll_s: float = 0.2
    idle_poll_s: float = 1.0
    node_config: Mapping[str, str | int | float | bool] = field(default_factory=dict)


EventKind = Literal[
    "waiting",  # the server still counts a former process of this clinic as online
    "connected",
    "disconnected",
    "received",
    "answered",
    "failed",  # the app raised, and the server was told the reason
    "refused",  # the message was against this clinic's limits
    "dropped",  # the run or the message is gone, so nobody waits for an answer
    "stopped",
]


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened, for a display or a log on this machine.

    ``detail`` is a sentence, or the reason that the server was told. Sizes are
    payload bytes, ``seconds`` is the time spent on the answer. ``rule`` is the reason of a
    refusal by this clinic's rules.
    """

    kind: EventKind
    detail: str = ""
    rule: str = ""
    message_type: str = ""
    group: str = ""
    bytes_in: int = 0
    bytes_out: int = 0
    seconds: float = 0.0


def _ignore(_event: Event) -> None:
    return


def serve(
    client_app: Application,
    settings: ConnectionSettings,
    *,
    stop: threading.Event,
    on_event: Callable[[Event], None] = _ignore,
    clock: Clock = time.time,
    trail: Trail = Trail(),  # noqa: B008  (it keeps nothing)
    standing: Standing = Standing(),  # noqa: B008  (it keeps nothing)
) -> None:
    """Answer the server's messages with ``client_app`` until ``stop`` is set.

    Returns about a second after ``stop`` is set, or when the answer that is
    being computed is done. Outages are waited out however long they last.

    Args:
        client_app: a Flower ``ClientApp``, called in this thread.
        settings: whom to connect to, and what to allow.
        stop: set it, from a signal handler for example, to end.
        on_event: told what happens, in this thread; must not raise.
        clock: seconds since the epoch; replaced only by tests.
        trail: told of every message before it is answered, and before its answer leaves; what
            it raises ends this call, and nothing more is sent but a goodbye.
        standing: what a former process on this clinic's folder left.

    Raises:
        FlowerPinError: another Flower version is installed.
        ConfigError: the server's address is not ``host:port``.
        EnrolmentError: the key or CA file is unusable, or the server does not know the key.
        CertificateRefused: what answers has no certificate of the federation's CA.
        ClockSkew: the clocks differ by more than the server accepts.
        ConnectionFailed: what answers is of another version.
        StorageError: ``standing`` cannot be written.
    """
    require_pinned_flower()
    quiet_flower_log()
    key = load_key(settings.key)
    with open_http(read_ca(settings.ca), settings.traffic) as http:
        client = FleetClient(settings.server, http, key, clock)
        calls = PatientCalls(
            client,
            http,
            settings.server,
            key,
            key_file=settings.key,
            stop=stop,
            clock=clock,
            on_outage=lambda trouble: on_event(Event(kind="disconnected", detail=trouble)),
            on_recovery=lambda: on_event(Event(kind="connected")),
        )
        session = Session(
            client,
            calls,
            standing,
            server=settings.server,
            on_waiting=lambda: on_event(Event(kind="waiting", detail=_WAITING)),
        )
        try:
            session.activate()
            on_event(Event(kind="connected"))
            with session.heartbeat():
                _Worker(session, standing, client_app, settings, stop, on_event, trail).work()
        except Stopped:
            pass
        finally:
            session.deactivate()
            if settings.traffic is not None:
                settings.traffic.close()
        on_event(Event(kind="stopped"))


class _Worker:
    """Takes messages one by one; remembers the current run and its context."""

    def __init__(
        self,
        session: Session,
        standing: Standing,
        app: Application,
        settings: ConnectionSettings,
        stop: threading.Event,
        on_event: Callable[[Event], None],
        trail: Trail,
    ) -> None:
        self._session = session
        self._standing = standing
        self._trail = trail
        self._app = app
        self._settings = settings
        self._stop = stop
        self._on_event = on_event
        self._run: Run | None = None
        self._context: Context | None = None

    def work(self) -> None:
        self._excuse()
        busy_until = 0.0
        while not self._stop.is_set():
            try:
                found = self._session.poll()
                if found is not None:
                    self._standing.asked(found[0])
                    self._handle(*found)
                    self._standing.answered()
                    busy_until = time.monotonic() + _BUSY_S
                    continue
            except RunEnded:
                self._standing.answered()
                self._on_event(Event(kind="dropped", detail="the run has ended"))
            except MessageLost as lost:
                self._standing.answered()
                log.warning("%s", lost)
                self._on_event(Event(kind="dropped", detail=str(lost)))
                self._stop.wait(_LOST_PAUSE_S)
            self._stop.wait(self._pause(busy=time.monotonic() < busy_until))

    def _excuse(self) -> None:
        """Say that what a former process was asked has to be asked again.

        What had come was in memory. A step of a secure sum is on the disk, and so is its answer
        if there was one: asked again, this process goes on with both.
        """
        head = self._standing.question
        if head is None:
            return
        stage = head.metadata.message_type.partition(".")[2]
        lost = AdapterNotHeld if stage in ("", STAGES[0]) else Interrupted
        reply = refusal(head, lost.reason)
        self._trail.leaving(reply)
        with contextlib.suppress(RunEnded, MessageLost):
            self._session.deliver(reply, 0.0)
        self._standing.answered()

    def _pause(self, *, busy: bool) -> float:
        traffic = self._settings.traffic
        if traffic is not None and traffic.left() == 0:
            return _SPENT_S
        return self._settings.poll_s if busy else self._settings.idle_poll_s

    def _handle(self, head: Message, tree: ObjectTree) -> None:
        asked = head.metadata
        started = time.monotonic()
        bytes_in, rule = 0, ""
        try:
            self._require_traffic(0)
            run = self._run_of(asked.run_id)
            self._check(run, asked)
            message, bytes_in = self._session.fetch(head, tree, self._settings.max_payload_bytes)
            self._check_same(message, asked)
            # An answer is about as large as what it answers: better none than half a one.
            self._require_traffic(bytes_in)
            self._trail.received(message)
            self._on_event(_about("received", asked, bytes_in=bytes_in))
            started = time.monotonic()
            reply, reason = answer(self._app, message, self._context_of(run))
            if reply.has_content():
                self._require_traffic(_content_bytes(reply))
            kind, detail = ("failed", reason) if reason else ("answered", "")
        except PolicyRefused as error:
            log.warning("a message of the server was refused: %s", error)
            self._trail.refused(head, error)
            reply, kind, detail = refusal(head, error.reason), "refused", str(error)
            rule = error.reason
        seconds = time.monotonic() - started
        self._trail.leaving(reply)
        bytes_out = self._session.deliver(reply, seconds)
        about = _about(kind, asked, bytes_in=bytes_in, bytes_out=bytes_out, seconds=seconds)
        self._on_event(replace(about, detail=detail, rule=rule))

    def _require_traffic(self, size: int) -> None:
        if self._settings.traffic is not None:
            self._settings.traffic.require(size)

    def _check(self, run: Run, asked: Metadata) -> None:
        if run.fab_id != FAB_ID or run.primary_task_type != TaskType.SERVER_APP:
            raise PolicyRefused(f"the server runs {run.fab_id!r}, but this client is for {FAB_ID}")
        if asked.message_type not in self._settings.message_types:
            allowed = ", ".join(sorted(self._settings.message_types))
            raise PolicyRefused(
                f"the server asks for {asked.message_type!r}, but this clinic allows {allowed} only"
            )
        if (asked.dst_node_id, asked.src_node_id) != (self._session.node_id, SUPERLINK_NODE_ID):
            raise PolicyRefused("a message is addressed to another clinic, or not from the server")

    @staticmethod
    def _check_same(message: Message, asked: Metadata) -> None:
        """The content brings its own copy of the metadata, and the app acts on that one."""
        got = message.metadata
        same = (
            got.run_id == asked.run_id
            and got.message_type == asked.message_type
            and got.group_id == asked.group_id
            and got.dst_node_id == asked.dst_node_id
            and got.src_node_id == asked.src_node_id
        )
        if not same or not message.has_content():
            raise PolicyRefused("a message is not what its announcement said")

    def _run_of(self, run_id: int) -> Run:
        if self._run is None or self._run.run_id != run_id:
            self._run, self._context = self._session.run_of(run_id), None
        return self._run

    def _context_of(self, run: Run) -> Context:
        if self._context is None:
            self._context = Context(
                run_id=run.run_id,
                node_id=self._session.node_id,
                node_config=dict(self._settings.node_config),
                state=RecordDict(),
                run_config={},
            )
        return self._context


def _content_bytes(reply: Message) -> int:
    """Return the size of what a reply carries."""
    records = reply.content.array_records.values()
    return sum(len(array.data) for record in records for array in record.values())


def _about(
    kind: EventKind,
    asked: Metadata,
    *,
    bytes_in: int = 0,
    bytes_out: int = 0,
    seconds: float = 0.0,
) -> Event:
    return Event(
        kind=kind,
        message_type=asked.message_type,
        group=asked.group_id,
        bytes_in=bytes_in,
        bytes_out=bytes_out,
        seconds=seconds,
    )
