"""Locks between processes: one holder at a time, and none that outlives its process."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedpeft.errors import StorageError
from fedpeft.file_lock import LockHeld, exclusive, is_held

_HOLDER = """
import sys, time
from pathlib import Path
from fedpeft.file_lock import exclusive
with exclusive(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@contextmanager
def holder(path: Path) -> Generator[subprocess.Popen[str]]:
    """Another process that holds the lock until it is killed."""
    command = [sys.executable, "-c", _HOLDER, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def test_a_file_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot lock"), exclusive(tmp_path / "no" / "lock"):
        pass


def test_what_another_process_holds_is_refused_and_a_kill_lets_go(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with holder(path) as other:
        assert is_held(path)
        with pytest.raises(LockHeld), exclusive(path, wait_s=0):
            pass
        other.send_signal(signal.SIGKILL)
        with exclusive(path, wait_s=20):
            assert is_held(path)
    assert not is_held(path)


def test_who_waits_gets_the_lock_when_it_is_free(tmp_path: Path) -> None:
    path, order = tmp_path / "lock", list[str]()

    def wait() -> None:
        with exclusive(path):
            order.append("second")

    with exclusive(path):
        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(0.1)
        order.append("first")
    thread.join(20)
    assert order == ["first", "second"]


def test_a_folder_is_locked_without_a_file_in_it(tmp_path: Path) -> None:
    with exclusive(tmp_path), pytest.raises(LockHeld), exclusive(tmp_path, wait_s=0.05):
        pass
    assert list(tmp_path.iterdir()) == []


def test_asking_whether_a_lock_is_held_makes_no_file(tmp_path: Path) -> None:
    assert not is_held(tmp_path / "lock")
    assert list(tmp_path.iterdir()) == []


def test_a_lock_file_is_for_its_owner_alone(tmp_path: Path) -> None:
    with exclusive(tmp_path / "lock"):
        assert (tmp_path / "lock").stat().st_mode & 0o777 == 0o600
