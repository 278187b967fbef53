"""What watches a process is told the truth: alive while it goes on, silent when it hangs."""

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from fedpeft import watchdog
from fedpeft.errors import ConfigError
from fedpeft.watchdog import Life, Watchers, came_round, supervised


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[socket.socket]:
    """The receiving end of a notification socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind(str(tmp_path / "notify"))
        channel.settimeout(5)
        yield channel


def told(channel: socket.socket) -> list[str]:
    """Return what was said up to now."""
    channel.setblocking(False)
    said: list[str] = []
    try:
        while True:
            said.append(channel.recv(4096).decode())
    except BlockingIOError:
        return said


@pytest.mark.parametrize("value", ["", "0", "soon", "-1", "٣"])
def test_a_period_that_is_none_is_refused(value: str):
    with pytest.raises(ConfigError, match="WATCHDOG_USEC"):
        Watchers.of({"WATCHDOG_USEC": value})


def test_nobody_watches_where_the_environment_names_nobody():
    assert Watchers.of({}) == Watchers(socket=None, every_s=None, heartbeat=None)


def test_the_watchdog_of_another_process_is_not_answered():
    environment = {"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getpid() + 1)}
    assert Watchers.of(environment).every_s is None


def test_three_signs_of_life_fit_into_the_time_that_systemd_waits():
    environment = {"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getpid())}
    assert Watchers.of(environment).every_s == 1.0


def test_a_thread_that_waits_and_does_not_come_round_is_not_alive():
    now = [0.0]
    life = Life(lambda: 0.002 * now[0], lambda: now[0])
    now[0] = 10.0
    assert not life.went_on()


def test_a_thread_that_computes_is_alive():
    now = [0.0]
    life = Life(lambda: 0.5 * now[0], lambda: now[0])
    now[0] = 10.0
    assert life.went_on()


def test_a_loop_that_comes_round_is_alive_until_it_stops_doing_so():
    now = [0.0]
    life = Life(lambda: 0.0, lambda: now[0])
    came_round()
    now[0] = 10.0
    assert life.went_on()
    now[0] = 20.0
    assert not life.went_on()


@pytest.mark.usefixtures("systemd")
def test_a_watcher_that_is_gone_does_not_stop_the_work(tmp_path: Path):
    Watchers(socket=str(tmp_path / "gone"), every_s=None, heartbeat=None).notify("READY=1")


def test_a_watcher_that_takes_no_messages_does_not_stop_the_work(
    systemd: socket.socket, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(watchdog, "_PATIENCE_S", 0.05)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as filler:
        filler.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                filler.sendto(b"full", systemd.getsockname())
    ended = threading.Thread(
        target=Watchers(socket=systemd.getsockname(), every_s=None, heartbeat=None).notify,
        args=("STOPPING=1",),
        daemon=True,
    )
    ended.start()
    ended.join(5)
    assert not ended.is_alive()


def test_systemd_hears_ready_signs_of_life_and_stopping(
    systemd: socket.socket, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("NOTIFY_SOCKET", systemd.getsockname())
    monkeypatch.setenv("WATCHDOG_USEC", "150000")
    with supervised():
        came_round()
        assert systemd.recv(64) == b"READY=1"
        came_round()
        assert systemd.recv(64) == b"WATCHDOG=1"
    assert told(systemd)[-1] == "STOPPING=1"


def test_a_process_is_not_ready_before_its_loop_comes_round(
    systemd: socket.socket, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("NOTIFY_SOCKET", systemd.getsockname())
    with supervised():
        assert told(systemd) == []
        came_round()
        came_round()
        assert told(systemd) == ["READY=1"]
    came_round()
    assert told(systemd) == ["STOPPING=1"]


def test_an_abstract_socket_is_reached(monkeypatch: pytest.MonkeyPatch):
    name = f"fedpeft-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind(f"\0{name}")
        channel.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}")
        with supervised():
            came_round()
            assert channel.recv(64) == b"READY=1"


def test_a_main_thread_that_hangs_gives_no_sign_of_life(
    systemd: socket.socket, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("NOTIFY_SOCKET", systemd.getsockname())
    monkeypatch.setenv("WATCHDOG_USEC", "90000")
    with supervised():
        time.sleep(0.05)
        told(systemd)
        time.sleep(0.4)
        assert told(systemd) == []


def test_the_heartbeat_file_is_renewed_only_while_the_loop_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    heartbeat = tmp_path / "heartbeat"
    monkeypatch.setenv(watchdog.HEARTBEAT, str(heartbeat))
    monkeypatch.setattr(watchdog, "HEARTBEAT_S", 0.05)
    with supervised():
        os.utime(heartbeat, (0, 0))
        time.sleep(0.3)
        assert heartbeat.stat().st_mtime == 0
        came_round()
        time.sleep(0.3)
        assert heartbeat.stat().st_mtime > 0


def test_where_nobody_watches_no_thread_is_started():
    code = (
        "import threading; from fedpeft.watchdog import supervised\n"
        "with supervised(): print(threading.active_count())"
    )
    names = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", watchdog.HEARTBEAT)
    environment = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert done.stdout == "1\n", done.stderr


# the loops of the programs


def went_on(work: Callable[[], object]) -> bool:
    life = Life(lambda: 0.0, time.monotonic)
    work()
    return life.went_on()


def test_a_server_that_looks_for_clinics_or_answers_comes_round():
    from fedpeft_server.link.grid import FederationGrid

    grid = FederationGrid(
        cast(Any, None),
        cast(Any, None),
        connected=list,
        lost=threading.Event(),
        stop=threading.Event(),
        poll_s=0.1,
    )
    assert went_on(grid.get_node_ids)
    assert not went_on(lambda: None)


def test_a_client_that_calls_the_server_comes_round():
    from fedpeft_client.link.patient_calls import PatientCalls

    nobody = cast(Any, None)
    calls = PatientCalls(
        nobody,
        nobody,
        "localhost:1",
        ec.generate_private_key(ec.SECP384R1()),
        key_file=Path("key.pem"),
        stop=threading.Event(),
        clock=time.time,
        on_outage=nobody,
        on_recovery=nobody,
    )
    assert went_on(lambda: calls.call(lambda request: request, "what is there to do"))
