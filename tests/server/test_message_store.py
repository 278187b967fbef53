"""Flower's database under load and damage."""

import contextlib
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from pathlib import Path

import pytest

from fedpeft.errors import StorageError
from fedpeft.sealing.identity import Identity
from fedpeft_server.enrolments.enrolment import Enrolments
from fedpeft_server.link import superlink
from fedpeft_server.link.message_store import require_sound
from fedpeft_server.link.superlink import SuperLink, SuperLinkSettings
from fedpeft_server.site.pki import create_authority
from tests.server.test_superlink import enrolling

FLOWER_S = 5.0
"""How long Flower's own connections wait."""
_HOLDER = """
import sqlite3, sys, time

database = sqlite3.connect(sys.argv[1], isolation_level=None)
database.execute("BEGIN IMMEDIATE")
print("held", flush=True)
time.sleep(float(sys.argv[2]))
database.execute("ROLLBACK")
"""


def link_in(directory: Path) -> SuperLink:
    authority = create_authority(directory / "keys", "localhost:1")
    enrolments = Enrolments(
        directory / "enrolment.db",
        federation="heart",
        server="s:1",
        ca_pem=authority.ca_pem(),
        identity=Identity.generate().public,
    )
    return SuperLink(
        SuperLinkSettings(directory=directory, host="127.0.0.1", port=0), authority, enrolments
    )


@contextlib.contextmanager
def held(database: Path, seconds: float) -> Generator[None]:
    """Let another process hold the write lock for that long."""
    command = [sys.executable, "-c", _HOLDER, str(database), str(seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        yield


def test_a_process_that_holds_the_database_for_longer_than_flower_waits_fails_no_call(
    tmp_path: Path,
):
    with link_in(tmp_path) as link:
        state, task_id, began = link._state, link._task_id, time.monotonic()
        assert state is not None and task_id is not None
        alive: list[bool] = []
        with held(tmp_path / "flower.db", FLOWER_S + 1.5):
            beating = threading.Thread(
                target=lambda: alive.append(state.acknowledge_task_heartbeat(task_id))
            )
            beating.start()
            # The same of a call of a clinic, on another connection.
            node = state.create_node("", "", b"a key", 30.0)
            beating.join()
        assert time.monotonic() - began > FLOWER_S
        assert alive == [True]
        assert node


def test_a_heartbeat_that_cannot_be_written_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(superlink, "_HEARTBEAT_S", 0.2)
    monkeypatch.setattr("fedpeft_server.link.message_store._BUSY_MS", 100)
    with link_in(tmp_path) as link, held(tmp_path / "flower.db", 1.5):
        assert link.grid._lost.wait(10)


@pytest.mark.parametrize("damage", ["no database", "cut short", "overwritten"])
def test_a_damaged_message_store_is_told_and_a_new_one_serves(damage: str, tmp_path: Path):
    link = link_in(tmp_path)
    with link:
        pass
    database = tmp_path / "flower.db"
    with contextlib.closing(sqlite3.connect(database)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    whole = database.read_bytes()
    damaged = {
        "no database": b"this is no database at all" * 100,
        "cut short": whole[: len(whole) // 2],
        "overwritten": whole[:8192] + bytes(len(whole) - 8192),
    }[damage]
    database.write_bytes(damaged)

    with pytest.raises(StorageError, match=r"flower\.db is damaged \(.*move it away"), link:
        pass
    assert database.read_bytes() == damaged
    for name in ("flower.db", "flower.db-wal", "flower.db-shm"):
        (tmp_path / name).unlink(missing_ok=True)
    with link:
        assert link.run_id


def test_clinics_keep_their_numbers_in_a_new_message_store(tmp_path: Path):
    link = link_in(tmp_path)
    for name in ("anna", "bert"):
        invitation = link._enrolments.create_invitation(name, 3600.0, fingerprint="f" * 64)
        with link:
            link._enrol(**enrolling(invitation.token))
            names = link.names()
    for path in tmp_path.glob("flower.db*"):
        path.unlink()

    # A clinic that runs goes on under its number, and is not told that it is unknown.
    with link:
        assert link.names() == names
        state = link._state
        assert state is not None
        for clinic in link._enrolments.clinics():
            key = clinic.public_key.encode()
            assert state.get_node_id_by_public_key(key) == clinic.node_id


def test_a_clinic_that_enrols_while_the_round_loop_looks_gets_one_node(tmp_path: Path):
    link = link_in(tmp_path)
    with link:
        for attempt in range(10):
            invitation = link._enrolments.create_invitation(
                f"clinic-{attempt}", 3600.0, fingerprint="f" * 64
            )
            sent, failed = enrolling(invitation.token), list[Exception]()
            together = threading.Barrier(2)

            def look(together: threading.Barrier = together) -> None:
                together.wait()
                try:
                    for _ in range(20):
                        link.connected()
                except Exception as error:
                    failed.append(error)  # noqa: B023 - joined below

            looking = threading.Thread(target=look)
            looking.start()
            together.wait()
            link._enrol(**sent)
            looking.join()
            assert failed == []
        assert len(link.names()) == 10


def test_an_empty_message_store_is_sound(tmp_path: Path):
    (tmp_path / "flower.db").touch()
    require_sound(tmp_path / "flower.db")
