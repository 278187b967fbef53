"""A server and five clinics in processes of their own, which a seeded schedule kills.

Each clinic reaches the server through a bad link. Processes are started again as a service
manager would, and what ends by itself is remembered. What must hold in the end is not known
here.
"""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from fedpeft.config import KeySettings
from fedpeft_server.site.directory import create_site, open_site
from tests.integration.chaos_proxy import BadLinks

SERVER = "server"
CLINICS = ("bay", "cape", "delta", "elm", "fjord")
CANARY, PATIENT = "Quokka-5822-Canary", "patient-Zebra-0926"
STEPS = 12
FINISHED, INTERRUPTED = 0, 130
_STARTED_S = 60.0
_STOPPED_S = 25.0


@dataclass(frozen=True, kw_only=True)
class Act:
    """Something that happens to a process: after a wait it gets a signal, and is down a while."""

    after_s: float
    victim: str
    signal: signal.Signals
    down_s: float


def schedule(seed: int, pace_s: float) -> Iterator[Act]:
    """Return what happens, for ever; the same for the same seed.

    Everybody's turn comes before anybody's comes again. ``pace_s`` is the mean wait.
    """
    chance = random.Random(seed)
    while True:
        turn = [SERVER, *CLINICS]
        chance.shuffle(turn)
        for victim in turn:
            yield Act(
                after_s=chance.uniform(1.0, 2 * pace_s - 1.0),
                victim=victim,
                signal=signal.SIGTERM if chance.random() < 0.2 else signal.SIGKILL,
                down_s=chance.choice((0.0, 0.5, 2.0)),
            )


class Nursery:
    """The processes, all forked from one that has the libraries loaded."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("chaos_nursery.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._heard = threading.Condition()
        self._born: list[int] = []
        self._codes: dict[int, int] = {}
        self._asked = 0
        self._reader = threading.Thread(target=self._listen, name="nursery")
        self._reader.start()

    def start(
        self,
        program: str,
        output: Path,
        *arguments: str,
        dies_at: Mapping[str, str | int] | None = None,
    ) -> int:
        """Start a program that prints into ``output``, and return the number of its process.

        It is killed at the line of its audit log that has all facts of ``dies_at``.
        """
        order = {
            "program": program,
            "output": str(output),
            "arguments": arguments,
            "dies_at": dies_at,
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        self._asked += 1
        with self._heard:
            assert self._heard.wait_for(lambda: len(self._born) == self._asked, _STARTED_S)
            return self._born[-1]

    def code(self, child: int) -> int | None:
        """Return the exit code of a process, a signal's as a negative number; None: it runs."""
        return self._codes.get(child)

    def ended(self, child: int, timeout_s: float) -> int:
        """Wait for the end of a process, and return its code."""
        with self._heard:
            assert self._heard.wait_for(lambda: child in self._codes, timeout_s)
            return self._codes[child]

    def close(self) -> None:
        """End all of them."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(_STARTED_S)
        self._reader.join()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                kind, first, second = line.split()
                with self._heard:
                    if kind == "born":
                        self._born.append(int(second))
                        self._codes.pop(int(second), None)  # of an earlier one of that number
                    else:
                        self._codes[int(first)] = int(second)
                    self._heard.notify_all()


@dataclass
class ChaosFederation:
    """The files of a federation, and what happened to it."""

    root: Path
    model: Path
    nursery: Nursery
    port: int
    links: BadLinks
    running: dict[str, int] = field(default_factory=dict[str, int])
    acts: list[Act] = field(default_factory=list[Act])
    unasked: list[tuple[str, int]] = field(default_factory=list[tuple[str, int]])
    """Programs that ended although nobody had ended them, and their codes."""
    ends: list[tuple[str, float]] = field(default_factory=list[tuple[str, float]])
    """Who was ended, and how many seconds it took."""
    first_seen: dict[int, str] = field(default_factory=dict[int, str])
    """The hash of every finished round, as it was when it was seen first."""

    @property
    def site(self) -> Path:
        return self.root / "site"

    @property
    def rounds(self) -> Path:
        return self.site / "run" / "rounds"

    def output(self, name: str) -> Path:
        return self.root / "outputs" / name

    def box(self, name: str) -> Path:
        return self.root / name / "box"

    def records(self, name: str) -> Path:
        return self.root / name / "train.jsonl"

    def start(self, name: str) -> None:
        """Start the program of the server or a clinic."""
        program = "fedpeft-server" if name == SERVER else "fedpeft-client"
        place = self.site if name == SERVER else self.box(name)
        self.running[name] = self.nursery.start(program, self.output(name), "start", str(place))

    def do(self, *command: str) -> tuple[int, str]:
        """Run another command to its end; return its code and what it printed."""
        output = self.output("commands") / f"{time.monotonic_ns()}"
        child = self.nursery.start(command[0], output, *command[1:])
        return self.nursery.ended(child, 120), output.read_text("utf-8")

    def suffer(self, act: Act) -> None:
        """Let something happen to a process."""
        self.acts.append(act)
        self.end(act.victim, act.signal)

    def end(self, name: str, number: signal.Signals) -> None:
        """End a process by a signal, and note if it ended otherwise than it should."""
        child = self.running.pop(name)
        if self.nursery.code(child) is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, number)
        began = time.monotonic()
        code = self.nursery.ended(child, _STOPPED_S)
        self.ends.append((name, time.monotonic() - began))
        asked = {-number} if number == signal.SIGKILL else {FINISHED, INTERRUPTED}
        if name == SERVER:
            asked.add(FINISHED)  # which it may have been just before
        if code not in asked:
            self.unasked.append((name, code))

    def look(self) -> None:
        """Take down the rounds that are finished since the last look; restart what ended."""
        for number in range(len(self.first_seen), 10_000):
            if not (self.rounds / str(number)).is_dir():
                break
            self.first_seen[number] = digest_of(self.rounds / str(number))
        for name, child in [*self.running.items()]:
            code = self.nursery.code(child)
            if code is not None and (name, code) != (SERVER, FINISHED):
                self.unasked.append((name, code))
                self.start(name)

    @property
    def finished(self) -> bool:
        child = self.running.get(SERVER)
        return child is not None and self.nursery.code(child) == FINISHED


def digest_of(folder: Path) -> str:
    """Return a hash over the names and contents of all files in a folder."""
    whole = sha256()
    for path in sorted(each for each in folder.rglob("*") if each.is_file()):
        whole.update(str(path.relative_to(folder)).encode())
        whole.update(sha256(path.read_bytes()).digest())
    return whole.hexdigest()


@contextlib.contextmanager
def chaos_federation(
    nursery: Nursery, root: Path, model: Path, seed: int, settings: dict[str, dict[str, Any]]
) -> Generator[ChaosFederation]:
    """Make a site and five boxes behind bad links, and let all six programs run."""
    (root / "outputs" / "commands").mkdir(parents=True)
    port = _free_port()
    with BadLinks(seed, port) as links:
        made = ChaosFederation(root, model, nursery, port, links)
        try:
            _make_site(made, settings)
            made.start(SERVER)
            _wait_for(made.output(SERVER), "listening on")
            _join(made, {name: links.open(name) for name in CLINICS})
            for name in CLINICS:
                made.start(name)
            yield made
        finally:
            for name in [*made.running]:
                made.end(name, signal.SIGKILL)


def live_through(
    made: ChaosFederation, acts: Iterator[Act], *, most: int, longest_s: float
) -> None:
    """Let up to ``most`` of the acts happen, then wait until the server has finished."""
    deadline = time.monotonic() + longest_s
    for _, act in zip(range(most), acts, strict=False):
        if not _wait(made, act.after_s, deadline) or made.finished:
            break
        made.suffer(act)
        if not _wait(made, act.down_s, deadline):
            break
        made.start(act.victim)
    while not made.finished:
        if not _wait(made, 0.2, deadline):
            pytest.fail(f"not finished after {longest_s:.0f} s, rounds {sorted(made.first_seen)}")
    made.look()
    for name in CLINICS:
        made.end(name, signal.SIGTERM)


def _wait(made: ChaosFederation, seconds: float, deadline: float) -> bool:
    """Wait and look; return whether there is time left."""
    until = time.monotonic() + seconds
    while True:
        made.look()
        if time.monotonic() >= min(until, deadline):
            return time.monotonic() < deadline
        time.sleep(min(0.1, max(0.0, until - time.monotonic())))


def _make_site(made: ChaosFederation, settings: dict[str, dict[str, Any]]) -> None:
    create_site(
        made.site,
        address=f"127.0.0.1:{made.port}",
        name="sea",
        base=str(made.model),
        keys=KeySettings(),
    )
    tables: dict[str, dict[str, Any]] = {
        "model": {"base": str(made.model), "dtype": "float32"},
        "adapter": {"rank": 2, "alpha": 4.0},
        "training": {"local_steps": STEPS, "batch_size": 4, "max_length": 64},
        "strategy": {"name": "fedavg"},
        **settings,
    }
    text = 'name = "sea"\n'
    for table, values in tables.items():
        lines = [f"{key} = {json.dumps(value)}" for key, value in values.items()]
        text += "\n".join([f"\n[{table}]", *lines]) + "\n"
    (made.site / "federation.toml").write_text(text)


def _join(made: ChaosFederation, ports: dict[str, int]) -> None:
    """Enrol the clinics, and let each reach the server by a port of its own."""
    site, joining = open_site(made.site), dict[str, int]()
    enrolments, base = site.enrolments(), site.fingerprint()
    for name in CLINICS:
        folder = made.root / name
        folder.mkdir()
        _write_records(made, name)
        enrolments.create_invitation(name, 3600, fingerprint=base).write(folder / "invitation")
        joining[name] = made.nursery.start(
            *("fedpeft-client", made.output("commands") / name, "join", str(folder / "invitation")),
            *("--dir", str(made.box(name)), "--model", str(made.model)),
            *("--train", str(made.records(name)), "--valid", str(folder / "valid.jsonl")),
        )
    for name, child in joining.items():
        assert made.nursery.ended(child, _STARTED_S) == 0
        _configure(made.box(name) / "client.toml", made.port, ports[name])


def _write_records(made: ChaosFederation, name: str) -> None:
    rows = [
        {
            "question": f"What does {CANARY} of {name} take, row {row}?",
            "answer": f"{row} of {CANARY}.",
            "patient_id": f"{PATIENT}-{row // 2}",
        }
        # No two have as many rows, so no two count alike.
        for row in range(16 + 4 * CLINICS.index(name))
    ]
    valid = made.root / name / "valid.jsonl"
    for path, some in ((made.records(name), rows), (valid, rows[:4])):
        path.write_text("".join(json.dumps(row) + "\n" for row in some), "utf-8")


def _configure(file: Path, port: int, link: int) -> None:
    settings = file.read_text()
    for setting, other in {
        f'address = "127.0.0.1:{port}"': f'address = "127.0.0.1:{link}"',
        "require_secagg = true": "require_secagg = false",
        'adversary = "active"': 'adversary = "curious"',
        'dtype = "auto"': 'dtype = "float32"',
        "every_s = 60.0": "every_s = 0.0",
        "min_free_disk_mb = 1024": "min_free_disk_mb = 0",
    }.items():
        assert settings.count(setting) == 1, setting
        settings = settings.replace(setting, other)
    file.write_text(settings)


def _wait_for(output: Path, text: str) -> None:
    deadline = time.monotonic() + _STARTED_S
    while not output.exists() or text not in output.read_text("utf-8", errors="replace"):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
