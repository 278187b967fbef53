"""Flower's message store: how it is set up, kept small, and let go of.

Flower's parts are used as they are; what it has no call for is said to its database.
"""

import contextlib
import secrets
import sqlite3
from pathlib import Path
from typing import Final

from flwr.common.constant import TRANSPORT_TYPE_GRPC_RERE, Status
from flwr.server.superlink.linkstate import LinkState
from flwr.superlink.auth_plugin import NoOpControlAuthnPlugin
from flwr.superlink.config_loader import SuperLinkLifespanConfig
from sqlalchemy import Engine, event, text

from fedpeft.errors import StorageError

_COMPACT_ABOVE_BYTES: Final = 64 << 20
_BUSY_MS: Final = 60_000


def flower_config(database: Path) -> SuperLinkLifespanConfig:
    """Return what Flower is started with: no socket, no process and no log of its own."""
    return SuperLinkLifespanConfig(
        control_address="",
        health_server_address=None,
        host="127.0.0.1",
        port=0,
        insecure=True,
        certificates=None,
        # No socket serves the call that asks for it; if one ever did, nobody knows it.
        superexec_auth_secret=secrets.token_bytes(32),
        authn_plugin=NoOpControlAuthnPlugin(),
        event_log_plugin=None,
        fleet_event_log_plugin=None,
        enable_event_log=False,
        artifact_provider=None,
        enable_supernode_auth=True,
        fleet_api_type=TRANSPORT_TYPE_GRPC_RERE,
        fleet_api_address=None,
        simulation=False,
        ssl_ca_certfile=None,
        ssl_certfile=None,
        ssl_keyfile=None,
        database=str(database),
        isolation="process",
        runtime_dependency_install=False,
    )


def database(directory: Path) -> Path:
    """Return the message store in ``directory``, made with mode 600 if it is missing."""
    database = directory / "flower.db"
    # Created here, as SQLite would create it readable for everyone.
    database.touch(mode=0o600)
    return database


def require_sound(database: Path) -> None:
    """Look for damage before Flower reads the file; reads all of it.

    Raises:
        StorageError: it is damaged, or no database.
    """
    try:
        with contextlib.closing(sqlite3.connect(database, timeout=_BUSY_MS / 1e3)) as connection:
            (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.Error as error:
        found = str(error)
    if found != "ok":
        raise StorageError(
            f"{database} is damaged ({found}): it holds only messages that are under way, so move "
            f"it away, with {database.name}-wal and {database.name}-shm if they are there, and "
            "start again; finished rounds and enrolments are elsewhere, and the open round is "
            "repeated"
        )


def end_old_runs(state: LinkState) -> None:
    """End what a killed server left open, lest clinics train for a run nobody waits for."""
    for run in state.get_run_info(statuses=[Status.PENDING, Status.STARTING, Status.RUNNING]):
        state.stop_run(run.run_id)
        state.cleanup_run(run.run_id)


def compact(directory: Path) -> None:
    """Give the space of deleted messages back to the disk."""
    database = directory / "flower.db"
    if database.stat().st_size > _COMPACT_ABOVE_BYTES:
        with contextlib.closing(sqlite3.connect(database, timeout=_BUSY_MS / 1e3)) as connection:
            connection.execute("VACUUM")


def wait_longer(state: LinkState) -> None:
    """Let every connection of the message store wait for its turn longer than Flower's 5 s.

    On a slow or busy disk one large message can hold the database for more than that, and
    whoever waited would have its call refused as "database is locked".
    """

    def wait(connection: sqlite3.Connection, _record: object) -> None:
        connection.execute(f"PRAGMA busy_timeout = {_BUSY_MS}")

    for engine in _engines(state):
        event.listen(engine, "connect", wait)
        engine.dispose()  # what is open already was told Flower's number


def close_store(state: LinkState) -> None:
    """Close what Flower leaves to the garbage collector: its database connections."""
    for engine in _engines(state):
        engine.dispose()


def _engines(state: LinkState) -> list[Engine]:
    """Return Flower's database engines: of the messages, and of their contents."""
    return [getattr(part, "_engine") for part in (state, state.object_store)]  # noqa: B009


def message_engine(state: LinkState) -> Engine:
    """Return the database of the messages, without that of their contents."""
    return _engines(state)[0]


def change_node_key(state: LinkState, old: str, new: str) -> None:
    """Give a node of the message store another public key; Flower has no call for it."""
    statement = text("UPDATE node SET public_key = :new WHERE public_key = :old")
    with message_engine(state).begin() as connection:
        connection.execute(statement, {"old": old.encode("ascii"), "new": new.encode("ascii")})


def give_key(state: LinkState, number: int, key: str) -> bool:
    """Give the node of this id (unsigned, 64 bits) another public key; say whether there is one.

    Flower has no call for it.
    """
    statement = text("UPDATE node SET public_key = :key WHERE node_id = :number")
    with message_engine(state).begin() as connection:
        about = {"key": key.encode("ascii"), "number": _signed(number)}
        return connection.execute(statement, about).rowcount > 0


def give_node_id(state: LinkState, old: int, new: int) -> None:
    """Give a node without messages the id (unsigned, 64 bits) that its clinic knows it by.

    Flower has no call for it.
    """
    statement = text("UPDATE node SET node_id = :new WHERE node_id = :old")
    with message_engine(state).begin() as connection:
        connection.execute(statement, {"old": _signed(old), "new": _signed(new)})


def _signed(number: int) -> int:
    """Return an unsigned 64-bit number as SQLite keeps it."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)
