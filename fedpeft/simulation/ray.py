"""The ``ray`` engine: Flower's own simulation, for many cores or machines.

Every Ray actor is a process that loads the base model for itself, so it costs
more memory than ``local``; needs ``pip install 'fedpeft[ray]'``.
"""

import logging
import os
import time
from collections.abc import Iterable, Sequence
from typing import cast

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import PARTITION_ID_KEY
from flwr.serverapp import Grid, ServerApp

from fedpeft.errors import FederationError
from fedpeft.flower_pin import quiet_flower_log, require_pinned_flower
from fedpeft.protocol import EVALUATE, TRAIN
from fedpeft.sealing import PublicIdentity
from fedpeft.simulation.wire import wire_bytes
from fedpeft_client.rounds.app import ClinicDesk, Handler
from fedpeft_client.rounds.clinic import Clinic
from fedpeft_client.rounds.work import ClinicWork
from fedpeft_server.link.wire_meter import WireMeter
from fedpeft_server.rounds.loop import Federation

_WHICH_CLINIC = "query.clinic"
CPUS_PER_CLINIC = 1
"""Flower's own default is 2, which leaves half of the cores idle under models of this kind."""

_ANSWER_S = 300.0
_QUIET_ACTORS = {
    "FLWR_LOG_LEVEL": "ERROR",
    "PYTHONWARNINGS": "ignore",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
_POLL_S = 0.1

_desks: dict[tuple[Clinic, ...], ClinicDesk] = {}
"""The handlers of this process (a Ray actor), which keep the base model loaded."""


class RayLink:
    """The ``ray`` engine as the round loop sees it, from inside its ServerApp."""

    def __init__(self, grid: Grid, clinics: Sequence[Clinic]) -> None:
        self.meter = WireMeter()
        self.grid = cast("Grid", _MeteredGrid(grid, self.meter))
        self._clinics = _ask_clinics(grid, clinics)

    @property
    def run_id(self) -> int:
        """Flower's id of the run."""
        return self.grid.run.run_id

    def names(self) -> dict[int, str]:
        """Return the clinics' names by node id."""
        return {node: clinic.name for node, clinic in self._clinics.items()}

    def identities(self) -> dict[int, PublicIdentity]:
        """Return the clinics' public identities by node id."""
        return {node: clinic.membership.identity.public for node, clinic in self._clinics.items()}

    def successions(self) -> dict[str, tuple[bytes, ...]]:
        """Return nothing: simulated clinics keep their identities."""
        return {}

    def node_of(self, reply: Message) -> int:
        """Return the node that sent ``reply``."""
        return reply.metadata.src_node_id


class _MeteredGrid:
    """A grid that counts the bytes of what it sends and receives."""

    def __init__(self, grid: Grid, meter: WireMeter) -> None:
        self._grid = grid
        self._meter = meter

    def __getattr__(self, name: str) -> object:
        return getattr(self._grid, name)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        outgoing = list(messages)
        self._meter.add(down=sum(map(wire_bytes, outgoing)))
        replies = list(self._grid.send_and_receive(outgoing, timeout=timeout))
        self._meter.add(up=sum(wire_bytes(reply) for reply in replies if reply.has_content()))
        return replies


def run_ray(federation: Federation, clinics: Sequence[Clinic]) -> None:
    """Run ``federation`` on Flower's simulation runtime, one CPU for an actor.

    Raises:
        FederationError: Ray is not installed, or its runtime failed.
    """
    require_pinned_flower()
    try:
        import ray  # noqa: F401  # pyright: ignore[reportUnusedImport]
        from flwr.simulation import run_simulation
    except ImportError:
        raise FederationError(
            "the engine 'ray' is not installed; run `pip install 'fedpeft[ray]'` or use "
            "--engine local"
        ) from None
    failures: list[BaseException] = []
    server_app = _server_app(federation, clinics, failures)
    quiet_flower_log()
    # Flower calls its only Python entry to this runtime deprecated, for want of another.
    logging.getLogger("flwr").setLevel(logging.ERROR)
    os.environ.update(_QUIET_ACTORS)
    run_simulation(
        server_app,
        _client_app(tuple(clinics)),
        num_supernodes=len(clinics),
        backend_config={"client_resources": {"num_cpus": CPUS_PER_CLINIC, "num_gpus": 0.0}},
    )
    if failures:
        raise failures[0]


def _server_app(
    federation: Federation, clinics: Sequence[Clinic], failures: list[BaseException]
) -> ServerApp:
    app = ServerApp()

    def main(grid: Grid, _context: Context) -> None:
        try:
            federation.run(RayLink(grid, clinics))
        except BaseException as error:
            # Flower runs this in a thread and keeps the error to itself.
            failures.append(error)

    app.main()(main)
    return app


def _client_app(clinics: tuple[Clinic, ...]) -> ClientApp:
    """Return an app whose handlers find their state in the process that they run in."""
    app = ClientApp()

    def handler(kind: str) -> Handler:
        def handle(message: Message, context: Context) -> Message:
            return _desk_of(clinics).sealed(kind)(message, context)

        return handle

    app.train()(handler(TRAIN))
    app.evaluate()(handler(EVALUATE))
    app.query("clinic")(_tell_partition)
    return app


def _desk_of(clinics: tuple[Clinic, ...]) -> ClinicDesk:
    if clinics not in _desks:
        _desks[clinics] = ClinicDesk(lambda context: clinics[_partition(context)], ClinicWork())
    return _desks[clinics]


def _partition(context: Context) -> int:
    return int(cast("int", context.node_config[PARTITION_ID_KEY]))


def _tell_partition(message: Message, context: Context) -> Message:
    record = ConfigRecord({PARTITION_ID_KEY: _partition(context)})
    return Message(RecordDict({"clinic": record}), reply_to=message)


def _ask_clinics(grid: Grid, clinics: Sequence[Clinic]) -> dict[int, Clinic]:
    """Flower gives simulated nodes random ids: ask each which clinic it stands for."""
    deadline = time.monotonic() + _ANSWER_S
    while len(list(grid.get_node_ids())) < len(clinics) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    messages = [Message(RecordDict(), node, _WHICH_CLINIC) for node in grid.get_node_ids()]
    found: dict[int, Clinic] = {}
    for reply in grid.send_and_receive(messages, timeout=_ANSWER_S):
        if reply.has_content():
            record = cast("ConfigRecord", reply.content["clinic"])
            found[reply.metadata.src_node_id] = clinics[cast("int", record[PARTITION_ID_KEY])]
    if len(found) != len(clinics):
        raise FederationError(
            f"Ray started {len(found)} of {len(clinics)} simulated clinics; use --engine local, or "
            "see Ray's own messages"
        )
    return found
