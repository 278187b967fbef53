"""Flower's server, embedded: one public TLS socket, one run, no code sent to anyone.

Flower normally serves its administrative APIs beside the clinics' one, starts a
process for each run and ships code to the clinics. Here a run is opened in the
message store directly, and the server's app is called in this process.
"""

import contextlib
import math
import sqlite3
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self, TypeVar

from flwr.app import Context, Message, RecordDict
from flwr.common.constant import (
    NOOP_ACCOUNT_NAME,
    NOOP_FLWR_AID,
    SUPERLINK_NODE_ID,
    SubStatus,
)
from flwr.server.superlink.linkstate import LinkState
from flwr.serverapp import ServerApp
from flwr.supercore.constant import NOOP_FEDERATION_ID, NodeStatus, TaskType
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
from flwr.superlink.main import create_app
from sqlalchemy.exc import SQLAlchemyError

from fedpeft.errors import FederationError
from fedpeft.flower_pin import FAB_ID, quiet_flower_log, require_pinned_flower
from fedpeft.sealing import PublicIdentity
from fedpeft_server.enrolments.enrolment import Enrolments
from fedpeft_server.enrolments.rotation import renew_clinic
from fedpeft_server.link.certificate_watch import CertificateWatch
from fedpeft_server.link.grid import Arrival, FederationGrid
from fedpeft_server.link.listener import Listener, bind, tls_context
from fedpeft_server.link.message_store import (
    change_node_key,
    close_store,
    compact,
    database,
    end_old_runs,
    flower_config,
    give_key,
    give_node_id,
    require_sound,
    wait_longer,
)
from fedpeft_server.link.public_door import PublicDoor
from fedpeft_server.link.redelivery import offer_again
from fedpeft_server.link.wire_meter import WireMeter, metered_protocol
from fedpeft_server.site.lock import only_server
from fedpeft_server.site.pki import Authority
from fedpeft_server.sticks.post import StickPost
from fedpeft_server.sticks.route import StickRoute

# The store gives a run up after 60 s without a sign of life.
_HEARTBEAT_S: Final = 15.0

_Part = TypeVar("_Part")


@dataclass(frozen=True, kw_only=True)
class SuperLinkSettings:
    """Where the server listens and keeps its messages, and how much it takes in.

    ``max_request_bytes`` bounds one HTTP request, of which a large message
    takes one for every 5 MB; ``max_message_bytes`` bounds one clinic's reply.
    """

    directory: Path
    host: str = "0.0.0.0"  # noqa: S104 - clinics are on other machines
    port: int = 8443
    poll_s: float = 0.2
    max_request_bytes: int = 16 << 20
    max_message_bytes: int = 1 << 30


class SuperLink:
    """The running server; use it as a context manager.

    Entering binds the port, opens the message store and starts a new run.
    Leaving ends the run (as failed, unless :meth:`finish` or :meth:`run` said
    otherwise) and stops within seconds. Clinics that enrolled earlier keep
    working, as their keys and ids persist in ``settings.directory``.

    Raises on entering:
        FlowerPinError: another Flower version is installed.
        PortInUse, ConnectionFailed: the address cannot be listened on.
        StorageError: the directory cannot be used, or another server uses it.
    """

    def __init__(
        self,
        settings: SuperLinkSettings,
        authority: Authority,
        enrolments: Enrolments,
        *,
        stop: threading.Event | None = None,
        on_arrival: Arrival | None = None,
        succession: Sequence[str] = (),
        post: StickPost | None = None,
        stick_timeout_s: float = math.inf,
    ) -> None:
        """Prepare; ``post`` is that of clinics without a network, which have so long each time."""
        self.meter = WireMeter()
        self.stop = stop or threading.Event()
        self._settings = settings
        self._authority = authority
        self._enrolments = enrolments
        self._on_arrival = on_arrival
        self._succession = succession
        self._route = post and StickRoute(post, self._on_stick, stick_timeout_s)
        self._post = post
        self._making_node = threading.Lock()
        self._node_keys: dict[str, str] = {}
        self._opened = contextlib.ExitStack()
        self._state: LinkState | None = None
        self._listener: Listener | None = None
        self._grid: FederationGrid | None = None
        self._task_id: int | None = None

    def __enter__(self) -> Self:
        require_pinned_flower()
        quiet_flower_log()
        with contextlib.ExitStack() as opened:
            bound = bind(self._settings.host, self._settings.port)
            opened.callback(bound.close)
            opened.enter_context(only_server(self._settings.directory))
            store = database(self._settings.directory)
            require_sound(store)
            app = create_app(flower_config(store), SuperLinkLifespan)
            state: LinkState = app.state.linkstate_factory.state()
            opened.callback(close_store, state)
            wait_longer(state)
            offer_again(state)
            self._state = state
            end_old_runs(state)
            if self._post is not None:
                self._post.begin()
            compact(self._settings.directory)
            for clinic in self._enrolments.members():
                self._ensure_node(clinic.name, clinic.public_key)
            door = PublicDoor(
                app,
                member_keys=self._member_keys,
                member_stamp=self._enrolments.stamp,
                saw=self._saw,
                enrol=self._enrol,
                renew=self._renew,
                succession=self._succession,
                max_request_bytes=self._settings.max_request_bytes,
                max_message_bytes=self._settings.max_message_bytes,
            )
            tls = tls_context(self._authority)
            self._listener = Listener(door, bound, tls=tls, protocol=metered_protocol(self.meter))
            watch = CertificateWatch(tls, self._authority)
            watch.start()
            opened.callback(watch.stop)
            opened.callback(self._listener.stop)
            self._start_run(state, opened)
            self._listener.start()
            opened.callback(self.finish, False)
            self._opened = opened.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._opened.close()
        self._state = self._listener = self._grid = None

    @property
    def port(self) -> int:
        """The TCP port that clinics reach; useful when the settings said 0."""
        return _entered(self._listener).port

    @property
    def grid(self) -> FederationGrid:
        """The way to send messages and collect replies."""
        return _entered(self._grid)

    @property
    def run_id(self) -> int:
        """Flower's id of the run."""
        return self.grid.run.run_id

    def connected(self) -> dict[int, str]:
        """Return node id and clinic name of the clinics that are online.

        A clinic that vanished without a word counts as online for 60 s more, and one on the
        stick always.
        """
        online = {
            node.node_id
            for node in _entered(self._state).get_node_info(statuses=[NodeStatus.ONLINE])
        }
        for clinic in self._enrolments.members():
            # Admitted, or its key renewed by stick, beside the running server.
            if self._node_keys.get(clinic.name) != clinic.public_key:
                self._ensure_node(clinic.name, clinic.public_key)
        if self._post is not None:
            online |= self._on_stick().keys()
        return {node: name for node, name in self.names().items() if node in online}

    def _on_stick(self) -> dict[int, str]:
        """Return node id and name of the clinics that are reached by stick."""
        return {
            clinic.node_id: clinic.name
            for clinic in self._enrolments.members()
            if clinic.node_id is not None and clinic.carrier == "stick"
        }

    def names(self) -> dict[int, str]:
        """Return node id and clinic name of all clinics that may take part.

        A clinic that enrolled without an identity may not: nothing can be sealed to it.
        """
        return {
            clinic.node_id: clinic.name
            for clinic in self._enrolments.members()
            if clinic.node_id is not None
        }

    def identities(self) -> dict[int, PublicIdentity]:
        """Return node id and pinned public identity of the clinics in :meth:`names`."""
        return {
            clinic.node_id: clinic.identity
            for clinic in self._enrolments.clinics()
            if clinic.node_id is not None and clinic.identity is not None
        }

    def successions(self) -> Mapping[str, tuple[bytes, ...]]:
        """Return by name how clinics came to their identities, the oldest link first."""
        return self._enrolments.successions()

    def node_of(self, reply: Message) -> int:
        """Return the node that ``reply`` is about, also when Flower made it up itself."""
        return self.grid.node_of(reply)

    def run(self, server_app: ServerApp) -> None:
        """Call ``server_app`` in this thread and end the run whatever happens.

        Whatever the app raises, Ctrl-C included, is raised again here.
        """
        grid = self.grid
        context = Context(
            run_id=grid.run.run_id,
            node_id=SUPERLINK_NODE_ID,
            node_config={},
            state=RecordDict(),
            run_config={},
        )
        completed = False
        try:
            server_app(grid, context)
            completed = True
        finally:
            self.finish(completed)

    def finish(self, ok: bool) -> None:
        """End the run and delete its messages; a second call does nothing."""
        task_id, self._task_id = self._task_id, None
        if task_id is None:
            return
        state = _entered(self._state)
        state.finish_task(task_id, SubStatus.COMPLETED if ok else SubStatus.FAILED, "")
        state.cleanup_run(self.grid.run.run_id)

    def _start_run(self, state: LinkState, opened: contextlib.ExitStack) -> None:
        run_id = state.create_run(
            fab_id=FAB_ID,
            fab_version="",
            # There is no app to hash: clinics run the one they installed.
            fab_hash="",
            override_config={},
            federation_id=NOOP_FEDERATION_ID,
            federation_config=None,
            flwr_aid=NOOP_FLWR_AID,
            primary_task_type=TaskType.SERVER_APP,
        )
        task_id = _started_task(state, run_id)
        run = _run(state, run_id)
        # Flower's Message constructor reads the sender from this global.
        TaskIdentity.task_id, TaskIdentity.run_id = task_id, run_id
        TaskIdentity.node_id = SUPERLINK_NODE_ID
        self._task_id = task_id
        lost, ended = threading.Event(), threading.Event()
        beating = threading.Thread(
            target=_keep_alive, args=(state, task_id, lost, ended), name="fedpeft-run", daemon=True
        )
        beating.start()
        opened.callback(beating.join)
        opened.callback(ended.set)
        self._grid = FederationGrid(
            state,
            run,
            connected=self.connected,
            lost=lost,
            stop=self.stop,
            poll_s=self._settings.poll_s,
            on_arrival=self._on_arrival,
            route=self._route,
        )

    def _member_keys(self) -> frozenset[bytes]:
        return frozenset(each.public_key.encode("ascii") for each in self._enrolments.members())

    def _saw(self, public_key: bytes) -> None:
        # For people to look at only: a busy disk must not fail a clinic's call.
        with contextlib.suppress(sqlite3.Error):
            self._enrolments.saw(public_key.decode("ascii"))

    def _enrol(self, token: str, public_key: str, identity: str, proof: str) -> dict[str, str]:
        name = self._enrolments.redeem(token, public_key, identity, proof)
        for clinic in self._enrolments.members():
            if clinic.name == name:
                self._ensure_node(name, clinic.public_key)
        return self._member(name)

    def _renew(self, request: str) -> dict[str, str]:
        renewed = renew_clinic(self._enrolments, request)
        if renewed.old_key:
            # The clinic keeps its node, and with it the messages that wait for it.
            change_node_key(_entered(self._state), renewed.old_key, renewed.new_key)
        return self._member(renewed.name)

    def _member(self, name: str) -> dict[str, str]:
        """Return what a clinic is told of its membership."""
        (clinic,) = (each for each in self._enrolments.clinics() if each.name == name)
        return {
            "clinic": name,
            "federation": self._enrolments.federation,
            "keys_expire": clinic.keys_expire.isoformat(timespec="seconds"),
            "identity_expires": clinic.identity_expires.isoformat(timespec="seconds"),
        }

    def _ensure_node(self, name: str, public_key: str) -> None:
        state, key = _entered(self._state), public_key.encode("ascii")
        # A clinic that has just enrolled is met by the round loop and by its own request.
        with self._making_node:
            node_id = state.get_node_id_by_public_key(key)
            known = {each.name: each.node_id for each in self._enrolments.clinics()}.get(name)
            if node_id is None and known is not None and give_key(state, known, public_key):
                node_id = known  # its key was renewed by stick
            if node_id is None:
                node_id = state.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, key, 0)
                if known is not None:
                    # The message store is new: a clinic that runs goes on under its number.
                    give_node_id(state, node_id, known)
                    node_id = known
            self._enrolments.set_node_id(name, node_id)
            self._node_keys[name] = public_key


def _entered(part: _Part | None) -> _Part:
    if part is None:
        raise FederationError("the server is not running: use it inside its `with` block")
    return part


def _started_task(state: LinkState, run_id: int) -> int:
    for task in state.get_tasks(run_ids=[run_id]):
        if state.claim_task(task.task_id) and state.activate_task(task.task_id):
            return task.task_id
    raise FederationError("Flower did not open a run, see the log for the reason")


def _run(state: LinkState, run_id: int) -> Run:
    return state.get_run_info(run_ids=[run_id])[0]


def _keep_alive(
    state: LinkState, task_id: int, lost: threading.Event, ended: threading.Event
) -> None:
    while not ended.wait(_HEARTBEAT_S):
        try:
            alive = state.acknowledge_task_heartbeat(task_id)
        except SQLAlchemyError:
            # Its connections wait for longer than the store waits for a sign of life.
            alive = False
        if not alive:
            lost.set()
            return
