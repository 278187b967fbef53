"""The ``local`` engine: a whole federation in one process, one clinic after the other.

Runs the same ServerApp and ClientApp as the real network, and passes every
message through Flower's own serialisation, whose bytes are what is counted.
"""

import secrets
import uuid
from collections.abc import Callable, Iterable, Sequence

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.inflatable.inflatable_object import no_object_id_recompute
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedpeft.flower_pin import quiet_flower_log
from fedpeft.sealing import PublicIdentity
from fedpeft.simulation.wire import through_the_wire
from fedpeft.training import Observer
from fedpeft_client.rounds.app import ERROR_CODE, ClinicDesk, build_client_app
from fedpeft_client.rounds.clinic import Clinic
from fedpeft_client.rounds.work import ClinicWork
from fedpeft_server.link.app import build_server_app
from fedpeft_server.link.wire_meter import WireMeter
from fedpeft_server.rounds.loop import Federation

_FIRST_NODE = 1000


class LocalGrid(Grid):
    """Flower's ``Grid`` over a ClientApp in this process. Not thread-safe."""

    def __init__(
        self, client_app: ClientApp, nodes: Sequence[int], meter: WireMeter, run_id: int
    ) -> None:
        # Flower stamps messages with the process's task; outside a run there is none.
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, run_id, 1
        self._app = client_app
        self._meter = meter
        self._contexts = {
            node: Context(run_id, node, {}, RecordDict(), run_config={}) for node in nodes
        }
        self._replies: dict[str, Message] = {}
        self._run: Run | None = None

    def set_run(self, run: Run) -> None:
        """Keep the run that Flower's interface hands over."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run that was set."""
        if self._run is None:
            raise RuntimeError("no run was set on this grid")
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Return a message as Flower's interface builds it."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return the simulated nodes; all are always connected."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Deliver each message to its clinic at once and keep the reply."""
        ids: list[str] = []
        # Most messages carry the same content, which Flower would hash anew for each.
        with no_object_id_recompute():
            for message in messages:
                _set_id(message)
                self._deliver(message)
                ids.append(message.metadata.message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies to ``message_ids`` that there are."""
        return [self._replies.pop(key) for key in list(message_ids) if key in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Deliver one message after the other and yield its reply; nothing here can time out."""
        for message in messages:
            yield from self.pull_messages(self.push_messages([message]))

    def _deliver(self, message: Message) -> None:
        arrived, size = through_the_wire(message)
        self._meter.add(down=size)
        context = self._contexts[message.metadata.dst_node_id]
        try:
            reply = self._app(arrived, context)
        except Exception as error:
            # As on the real network: one clinic's crash is that clinic's failure.
            reply = Message(Error(ERROR_CODE, type(error).__name__), reply_to=arrived)
        _set_id(reply)
        if reply.has_content():
            reply, size = through_the_wire(reply)
            self._meter.add(up=size)
        self._replies[message.metadata.message_id] = reply


class LocalLink:
    """The ``local`` engine as the round loop sees it."""

    def __init__(self, client_app: ClientApp, clinics: Sequence[Clinic]) -> None:
        self._names = {_FIRST_NODE + at: clinic.name for at, clinic in enumerate(clinics)}
        self._identities = {
            _FIRST_NODE + at: clinic.membership.identity.public for at, clinic in enumerate(clinics)
        }
        self.run_id = secrets.randbits(63)
        self.meter = WireMeter()
        self.grid: Grid = LocalGrid(client_app, list(self._names), self.meter, self.run_id)

    def names(self) -> dict[int, str]:
        """Return the clinics' names by node id."""
        return dict(self._names)

    def identities(self) -> dict[int, PublicIdentity]:
        """Return the clinics' public identities by node id."""
        return dict(self._identities)

    def successions(self) -> dict[str, tuple[bytes, ...]]:
        """Return nothing: simulated clinics keep their identities."""
        return {}

    def node_of(self, reply: Message) -> int:
        """Return the node that sent ``reply``."""
        return reply.metadata.src_node_id

    def run(self, app: ServerApp) -> None:
        """Run ``app`` to its end in this thread."""
        app(self.grid, Context(self.run_id, 1, {}, RecordDict(), run_config={}))


def run_local(
    federation: Federation,
    clinics: Sequence[Clinic],
    observe: Observer | None = None,
    tell: Callable[[str], None] | None = None,
) -> None:
    """Run ``federation`` with all ``clinics`` on one copy of the base model."""
    quiet_flower_log()
    desk = ClinicDesk(
        lambda context: clinics[context.node_id - _FIRST_NODE], ClinicWork(observe, tell)
    )
    link = LocalLink(build_client_app(desk), clinics)
    link.run(build_server_app(federation, link))


def _set_id(message: Message) -> None:
    message.metadata.__dict__["_message_id"] = uuid.uuid4().hex
