"""The privacy ledger under kill -9, two processes, a full disk and a lock that is held."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from fedpeft.errors import LedgerDamaged, StorageError
from fedpeft.privacy.accounting import epsilon_of
from fedpeft.privacy.charge import Charge
from fedpeft.privacy.ledger import Law, Ledger, RoundEntry
from fedpeft.privacy.ledger_chain import anchor_path

STEP = Charge(noise="gaussian", sampling_rate=0.02, noise_multiplier=1.0)
ROUND = RoundEntry(federation="heart", run="run-1", round=1, unit="patient")
DELTA = 1e-5

BEGIN = """
import os, resource, signal, sys, time
from pathlib import Path
from fedpeft.errors import BudgetSpent, StorageError
from fedpeft.privacy import ledger_file
from fedpeft.privacy.charge import Charge
from fedpeft.privacy.ledger import Law, Ledger, RoundEntry

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

path, argument = Path(sys.argv[1]), sys.argv[2]
steps_run = path.with_name(f"run-{os.getpid()}.txt").open("w")

def run_step(number):
    print(number, file=steps_run, flush=True)

def open_round(ledger, steps, max_epsilon=None):
    step = Charge(noise="gaussian", sampling_rate=0.02, noise_multiplier=1.0)
    entry = RoundEntry(federation="heart", run="run-1", round=1, unit="patient")
    law = Law(max_epsilon=max_epsilon, delta=1e-5)
    return ledger.open_round(ledger.dataset(["a", "b"]).id, entry, step, steps, law)
"""
KILLED = """
def run_round(where):
    if where == "between the first commit and the first anchor":
        ledger_file.write_anchor = die
    ledger = Ledger(path)
    budget = open_round(ledger, 5)
    for step in range(5):
        if step == 3:
            if where == "before the charge":
                die()
            elif where == "before the commit":
                database = ledger._file._database
                database.set_trace_callback(lambda statement: statement == "COMMIT" and die())
            elif where == "between commit and anchor":
                ledger_file.write_anchor = die
            elif where == "before the anchor is in place":
                os.pwrite = die
            elif where == "between charge and step":
                budget.charge(step)
                die()
        budget.charge(step)
        run_step(step)

for where in argument.split("|"):
    path = Path(sys.argv[1]).parent / where / "ledger.db"
    path.parent.mkdir()
    steps_run = path.with_name("run-here.txt").open("w")
    child = os.fork()
    if child == 0:
        run_round(where)
    _, status = os.waitpid(child, 0)
    print(where, os.WTERMSIG(status))
"""
ENDLESS = """
budget = open_round(Ledger(path), 1)
for step in range(10**9):
    budget.charge(step)
    run_step(step)
"""
GREEDY = """
ledger = Ledger(path)
budget = open_round(ledger, 60, float(argument))
path.with_name(f"ready-{os.getpid()}").touch()
while len(list(path.parent.glob("ready-*"))) < 2:
    time.sleep(0.001)
try:
    for step in range(60):
        budget.charge(step)
        run_step(step)
except BudgetSpent:
    print("refused")
"""
FULL = """
ledger = Ledger(path)
budget = open_round(ledger, 10**6)
size = path.stat().st_size + int(argument)
resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
try:
    for step in range(10**6):
        budget.charge(step)
        run_step(step)
except StorageError as error:
    print(error)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


def start(script: str, path: Path, argument: str = "") -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", BEGIN + script, str(path), argument]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def steps_run(path: Path) -> int:
    return sum(len(file.read_text().splitlines()) for file in path.parent.glob("run-*.txt"))


def steps_charged(path: Path) -> int:
    """Return the steps charged, after checking that the ledger is whole and can go on."""
    with Ledger(path) as ledger:
        assert ledger.verify() == []
        dataset = ledger.dataset(["a", "b"]).id
        count = sum(ledger.charges(dataset).values())
        ledger.open_round(dataset, ROUND, STEP, 1, Law(delta=DELTA)).charge(0)
        assert ledger.verify() == []
        assert sum(ledger.charges(dataset).values()) == count + 1
    return count


def test_a_kill_at_any_point_of_a_step_hides_no_step(path: Path) -> None:
    charged_at = {
        "between the first commit and the first anchor": 0,
        "before the charge": 3,
        "before the commit": 3,
        "between commit and anchor": 4,
        "before the anchor is in place": 4,
        "between charge and step": 4,
    }
    output, _ = start(KILLED, path, "|".join(charged_at)).communicate(timeout=120)
    assert output.splitlines() == [f"{where} {signal.SIGKILL:d}" for where in charged_at]
    for where, charged in charged_at.items():
        ledger = path.parent / where / path.name
        assert steps_run(ledger) == min(charged, 3), where
        assert steps_charged(ledger) == charged, where


def test_kills_at_random_moments_hide_no_step(path: Path) -> None:
    charged = 0
    for kills, delay in enumerate((0.0, 0.013, 0.057), start=1):
        run = steps_run(path)
        child = start(ENDLESS, path)
        while steps_run(path) == run:
            time.sleep(0.001)
        time.sleep(delay)
        os.kill(child.pid, signal.SIGKILL)
        child.communicate()
        charged = steps_charged(path)
        # Each kill may lose one step, and each look before this one has charged one.
        assert 0 <= charged - (kills - 1) - steps_run(path) <= kills
    assert charged > 3


def test_two_processes_together_never_pass_the_bound(path: Path) -> None:
    limit = epsilon_of({STEP: 80}, DELTA).epsilon * 1.0001
    children = [start(GREEDY, path, repr(limit)) for _ in range(2)]
    outputs = [child.communicate(timeout=120)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0]
    assert "refused\n" in outputs
    charged = steps_charged(path)
    assert 60 <= charged <= 80
    assert charged == steps_run(path)


@pytest.mark.parametrize("room", [0, 10_000])
def test_no_step_runs_uncharged_when_the_disk_is_full(path: Path, room: int) -> None:
    output, _ = start(FULL, path, str(room)).communicate(timeout=120)
    assert "cannot be used" in output
    assert "free space" in output
    assert 0 <= steps_charged(path) - steps_run(path) <= 1


def test_a_file_that_may_not_grow_is_reported(path: Path) -> None:
    with Ledger(path) as ledger:
        dataset = ledger.dataset(["a", "b"]).id
        budget = ledger.open_round(dataset, ROUND, STEP, 1000, Law(delta=DELTA))
        ledger._file._database.execute("PRAGMA max_page_count = 1")
        with pytest.raises(StorageError, match="full"):
            for step in range(1000):
                budget.charge(step)
        count = sum(ledger.charges(dataset).values())
        ledger._file._database.execute("PRAGMA max_page_count = 10000")
        budget.charge(count)
        assert ledger.verify() == []


def test_a_ledger_locked_by_another_program_is_reported(path: Path) -> None:
    with Ledger(path, timeout_s=0.05) as ledger, closing(sqlite3.connect(path)) as other:
        dataset = ledger.dataset(["a", "b"]).id
        budget = ledger.open_round(dataset, ROUND, STEP, 1, Law(delta=DELTA))
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(StorageError, match="locked by another program"):
            budget.charge(0)
        other.rollback()
        budget.charge(0)
        assert ledger.charges(dataset) == {STEP: 1}


def test_a_file_of_something_else_is_refused(path: Path) -> None:
    path.write_bytes(b"not a database" * 100)
    with pytest.raises(LedgerDamaged, match="cannot be read as one"):
        Ledger(path)
    assert path.read_bytes() == b"not a database" * 100


def test_a_missing_folder_is_reported(path: Path) -> None:
    with pytest.raises(StorageError, match="folder exists"):
        Ledger(path.parent / "missing" / "ledger.db")


def test_a_ledger_of_a_newer_release_is_left_alone(path: Path) -> None:
    Ledger(path).close()
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA user_version = 2")
    with pytest.raises(StorageError, match="has schema 2"):
        Ledger(path)


def test_an_emptied_file_is_not_started_anew(path: Path) -> None:
    Ledger(path).close()
    assert anchor_path(path).exists()
    path.write_bytes(b"")
    with pytest.raises(LedgerDamaged, match="is gone or empty"):
        Ledger(path)


def test_looking_for_a_lost_ledger_puts_no_file_in_its_place(tmp_path: Path):
    path = tmp_path / "ledger.sqlite"
    Ledger(path).close()
    path.unlink()
    with pytest.raises(LedgerDamaged, match="is gone"):
        Ledger(path)
    assert not path.exists()
