"""A client that is asked to end: it finishes what is soon done, and nothing else."""

import signal
import subprocess
import sys
import time

import pytest

from fedpeft.errors import INTERRUPTED_EXIT_CODE

# The program with one more command, which waits as if a round of training were under way.
PROGRAM = """
import sys, threading, time
from fedpeft_client import cli

seconds, cli._GRACE_S = map(float, sys.argv[1:])

@cli.program.app.command()
def work():
    stop = threading.Event()
    cli._stop_on_signals(stop)
    print("working", flush=True)
    time.sleep(seconds)
    stop.wait(60)

cli.program.run(["work"])
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("work_s", "grace_s", "signals", "code"),
    [
        (1.0, 60, 1, 0),
        (60.0, 1, 1, INTERRUPTED_EXIT_CODE),
        (60.0, 60, 2, INTERRUPTED_EXIT_CODE),
    ],
    ids=["soon done", "not soon done", "asked twice"],
)
def test_it_ends_within_the_time_it_says_and_with_the_documented_code(
    number: signal.Signals, work_s: float, grace_s: int, signals: int, code: int
):
    command = [sys.executable, "-c", PROGRAM, str(work_s), str(grace_s)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "working\n"
        began = time.monotonic()
        for _ in range(signals):
            process.send_signal(number)
            time.sleep(0.2)
        assert process.wait(30) == code
        assert time.monotonic() - began > 0.9 * min(work_s, grace_s if signals == 1 else 0)
        assert process.stderr is not None
        told = process.stderr.read()
    assert f"in {float(grace_s)} seconds at the latest" in told
    assert "Traceback" not in told
