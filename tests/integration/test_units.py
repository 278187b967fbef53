"""The commands of `deploy/systemd/`, started as systemd would start them, on a real box and site.

Each unit's own ExecStart, mask and environment; its paths lie below a folder of the test.
Watched over a notification socket, asked for what it is there for, stopped by the unit's
signal within the unit's time, and judged by the unit's list of exit codes.
"""

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

import fedpeft_client.cli
import fedpeft_server.cli
from fedpeft_client.box import open_box
from fedpeft_client.link.reachability import probe
from tests.client.inference_boxes import make_box
from tests.integration.test_deploy import service

STATE = "/var/lib/fedpeft"
CLEAN_SIGNALS = {signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGPIPE}
STARTED_S = 120.0
WATCHDOG_S = 1.5
"""In place of the unit's minutes, so that the test sees a sign of life."""


def seconds(text: str) -> float:
    """Return a time span of a unit."""
    number, unit = re.fullmatch(r"(\d+)(min|s|)", text).groups()  # pyright: ignore[reportOptionalMemberAccess]
    return float(number) * (60 if unit == "min" else 1)


@dataclass
class Service:
    """A unit's program, running below ``home`` in the place of /var/lib/fedpeft."""

    name: str
    home: Path
    heard: list[str] = field(default_factory=list[str])

    def __post_init__(self) -> None:
        self.settings = service(self.name)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(self.home / f"{self.name}.notify"))
        self._socket.settimeout(0.2)
        command = self.settings["ExecStart"].replace("/opt/fedpeft/bin", f"{sys.prefix}/bin")
        self.output = self.home / f"{self.name}.log"
        with self.output.open("wb") as output:
            self._process = subprocess.Popen(
                shlex.split(command.replace(STATE, str(self.home))),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=self._environment(),
                umask=int(self.settings["UMask"], 8),
                cwd="/",
                start_new_session=True,
            )

    def _environment(self) -> dict[str, str]:
        found = {
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": str(self.home),
            "USER": self.settings["User"],
            "STATE_DIRECTORY": str(self.home),
            "OMP_NUM_THREADS": "1",  # the tests share few cores
        }
        if self.settings["Type"] == "notify":
            found["NOTIFY_SOCKET"] = str(self._socket.getsockname())
        if "WatchdogSec" in self.settings:
            found["WATCHDOG_USEC"] = str(int(WATCHDOG_S * 1e6))
        return found

    @property
    def told(self) -> str:
        return self.output.read_text("utf-8")

    def until_heard(self, state: str) -> None:
        """Wait until the program has told systemd something."""
        deadline = time.monotonic() + STARTED_S
        while state not in self.heard:
            assert self._process.poll() is None and time.monotonic() < deadline, self.told
            self._listen()

    def _listen(self) -> None:
        with contextlib.suppress(TimeoutError):
            while True:
                self.heard += self._socket.recv(4096).decode().splitlines()

    def stop(self) -> int:
        """Stop it as the unit says, and return its exit code, of a signal as a negative number."""
        self._process.send_signal(getattr(signal, self.settings["KillSignal"]))
        deadline = time.monotonic() + seconds(self.settings["TimeoutStopSec"])
        while self._process.poll() is None:
            assert time.monotonic() < deadline, self.told
            self._listen()
        self._listen()
        return self._process.returncode

    def end(self) -> int:
        """Wait for an end that nobody asked for."""
        return self._process.wait(STARTED_S)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._socket.close()

    def is_clean(self, code: int) -> bool:
        """Say whether systemd takes this for success."""
        listed = {int(each) for each in self.settings["SuccessExitStatus"].split()}
        return code == 0 or code in listed or -code in CLEAN_SIGNALS

    def is_tried_again(self, code: int) -> bool:
        """Say whether systemd starts it again after this."""
        lasting = {int(each) for each in self.settings["RestartPreventExitStatus"].split()}
        return not self.is_clean(code) and code not in lasting


@contextlib.contextmanager
def running(name: str, home: Path) -> Generator[Service]:
    made = Service(name, home)
    try:
        yield made
    finally:
        made.close()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def make_site(home: Path) -> None:
    address = f"localhost:{free_port()}"
    arguments = ("init", str(home / "site"), "--address", address, "--name", "heart")
    fedpeft_server.cli.program.app(arguments, standalone_mode=False)


def join(home: Path) -> Path:
    """Let the box north, which lies where the unit looks for it, join the site that runs."""
    records, invitation, box = home / "train.jsonl", home / "north.json", home / "box"
    rows = [{"question": f"{row}?", "answer": f"{row}."} for row in range(4)]
    records.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fedpeft_server.cli.program.app(
        ("invite", "north", "--dir", str(home / "site"), "--out", str(invitation)),
        standalone_mode=False,
    )
    fedpeft_client.cli.program.app(
        (
            *("join", str(invitation), "--dir", str(box), "--model", "embedded"),
            *("--train", str(records)),
        ),
        standalone_mode=False,
    )
    return box


@pytest.mark.parametrize("name", ["fedpeft-client", "fedpeft-serve", "fedpeft-server"])
def test_a_unit_without_its_box_or_site_needs_a_person_and_is_not_tried_again(
    name: str, tmp_path: Path
) -> None:
    with running(name, tmp_path) as made:
        code = made.end()
        assert code > 0
        assert not made.is_clean(code)
        assert not made.is_tried_again(code), (code, made.told)
        assert "READY=1" not in made.heard


def test_the_inference_unit_answers_and_stops_when_it_is_asked(tmp_path: Path) -> None:
    port = free_port()
    make_box(tmp_path / "box", rounds=1, listen=f"127.0.0.1:{port}")
    with running("fedpeft-serve", tmp_path) as made:
        assert "NOTIFY_SOCKET" not in made._environment()  # pyright: ignore[reportPrivateUsage]
        url, deadline = f"http://127.0.0.1:{port}/v1", time.monotonic() + STARTED_S
        while f"127.0.0.1:{port}" not in made.told:
            assert time.monotonic() < deadline, made.told
            time.sleep(0.1)
        models = [each["id"] for each in httpx.get(f"{url}/models").json()["data"]]
        assert "northfield" in models
        asked = {"model": "northfield", "messages": [{"role": "user", "content": "What?"}]}
        answer = httpx.post(f"{url}/chat/completions", json=asked | {"max_tokens": 4}, timeout=60)
        assert answer.json()["usage"]["completion_tokens"] > 0
        assert made.is_clean(made.stop()), made.told
        assert "Traceback" not in made.told
    assert (tmp_path / "box" / "inference").stat().st_mode & 0o777 == 0o700


def test_the_units_of_site_and_clinic_say_when_they_are_ready_and_alive(tmp_path: Path) -> None:
    make_site(tmp_path)
    with running("fedpeft-server", tmp_path) as server:
        server.until_heard("READY=1")
        box = open_box(join(tmp_path))
        assert probe(box.settings.server.address, box.ca).latency_s < STARTED_S
        with running("fedpeft-client", tmp_path) as client:
            client.until_heard("READY=1")
            for made in (server, client):
                made.until_heard("WATCHDOG=1")
            for made in (client, server):
                code = made.stop()
                assert made.is_clean(code), (code, made.told)
                assert made.heard.count("READY=1") == made.heard.count("STOPPING=1") == 1
                assert made.heard[-1] == "STOPPING=1"
                assert "Traceback" not in made.told
    private = [*(tmp_path / "box").glob("*.key"), *(tmp_path / "site" / "keys").glob("*.key")]
    assert private
    assert {path.stat().st_mode & 0o777 for path in private} == {0o600}
    assert os.environ.get("NOTIFY_SOCKET") is None
