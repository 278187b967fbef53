"""Clinics that hang or die in the middle of a real run are named, and the run finishes."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import psutil


def client_of(simulation: int, clinic: str) -> psutil.Process:
    """Return the process of one clinic of a simulation on the ``flower`` engine."""
    for process in psutil.Process(simulation).children():
        if process.cmdline()[-1].endswith(f"/{clinic}"):
            return process
    raise AssertionError(f"no process of {clinic}")


def test_a_hanging_and_a_killed_clinic_are_named_and_the_others_finish(tmp_path: Path) -> None:
    # Of four clinics secure aggregation cannot lose two (see test_secagg.py for what it can).
    settings = (
        "training.local_steps=2",
        "rounds.count=2",
        "rounds.timeout_s=15",
        "rounds.minimum_clinics=2",
        "aggregation.confidentiality=sealed",
    )
    options = [part for setting in settings for part in ("--set", setting)]
    command = [sys.executable, "-m", "fedpeft", "simulate", "--engine", "flower", *options]
    with subprocess.Popen(
        [*command, "--out", str(tmp_path)], stderr=subprocess.PIPE, text=True
    ) as running:
        assert running.stderr is not None
        for line in running.stderr:
            if line.startswith("base model"):
                hanging = client_of(running.pid, "harbour")
                killed = client_of(running.pid, "riverside")
            if line.startswith("round 1/2"):
                hanging.send_signal(signal.SIGSTOP)  # pyright: ignore[reportPossiblyUnboundVariable]
                killed.kill()  # pyright: ignore[reportPossiblyUnboundVariable]
        assert running.wait(120) == 0
    first, second = json.loads((tmp_path / "summary.json").read_text())["rounds"]
    assert first["failed"] == []
    assert second["participants"] == ["lindenpark", "northfield"]
    assert {each["clinic"] for each in second["failed"]} == {"harbour", "riverside"}
    assert {each["reason"] for each in second["failed"]} <= {"timeout", "offline"}
    # Nothing is left behind, the stopped process included.
    assert not hanging.is_running() or hanging.status() == psutil.STATUS_ZOMBIE  # pyright: ignore[reportPossiblyUnboundVariable]
