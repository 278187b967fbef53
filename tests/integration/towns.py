"""A server and three clinics, each a process of its own over good links, for whole runs."""

import contextlib
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from fedpeft.config import KeySettings
from fedpeft_server.site.directory import create_site
from tests.integration.chaos_federation import Nursery

CLINICS = ("bay", "cape", "delta")
SERVER = "server"
LONGEST_S = 240.0
_STARTED_S = 60.0


class Town:
    """The files of a federation, and its processes."""

    def __init__(self, root: Path, model: Path, nursery: Nursery) -> None:
        self.root, self.model, self.nursery = root, model, nursery
        self.running: dict[str, int] = {}
        (root / "outputs").mkdir(parents=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])

    @property
    def site(self) -> Path:
        return self.root / "site"

    @property
    def rounds(self) -> Path:
        return self.site / "run" / "rounds"

    def told(self, name: str) -> str:
        """What a program has printed."""
        output = self.root / "outputs" / name
        return output.read_text("utf-8", errors="replace") if output.exists() else ""

    def start(self, name: str, dies_at: Mapping[str, str | int] | None = None) -> None:
        """Start the program of the server or a clinic; ``dies_at`` as of :meth:`Nursery.start`."""
        program = "fedpeft-server" if name == SERVER else "fedpeft-client"
        place = self.site if name == SERVER else self.root / name / "box"
        output = self.root / "outputs" / name
        self.running[name] = self.nursery.start(
            program, output, "start", str(place), dies_at=dies_at
        )

    def code(self, name: str) -> int | None:
        """Return the code that a program ended with; None: it runs."""
        return self.nursery.code(self.running[name])

    def kill(self, name: str) -> None:
        """Kill a program, and wait until it is gone."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.running[name], signal.SIGKILL)
        self.nursery.ended(self.running[name], 20)

    def do(self, *command: str) -> tuple[int, str]:
        """Run another command to its end; return its code and what it printed."""
        output = self.root / "outputs" / f"command-{time.monotonic_ns()}"
        child = self.nursery.start(command[0], output, *command[1:])
        return self.nursery.ended(child, 120), output.read_text("utf-8")

    def until(self, true: Callable[[], bool]) -> None:
        """Wait for something, while all clinics go on by themselves."""
        deadline = time.monotonic() + LONGEST_S
        while not true():
            assert time.monotonic() < deadline, self.told(SERVER)
            for name in self.running.keys() - {SERVER}:
                assert self.code(name) is None, self.told(name)
            time.sleep(0.02)

    def digests(self, rounds: Iterable[int]) -> dict[int, str]:
        """Return a hash over the names and contents of all files of each round."""
        return {number: _digest_of(self.rounds / str(number)) for number in rounds}

    def finished(self) -> list[int]:
        """Return the rounds that are there."""
        names = [path.name for path in self.rounds.iterdir()] if self.rounds.is_dir() else []
        return sorted(int(name) for name in names if name.isdigit())

    def _make_site(self, tables: dict[str, dict[str, Any]]) -> None:
        create_site(
            self.site,
            address=f"127.0.0.1:{self.port}",
            name="sea",
            base=str(self.model),
            keys=KeySettings(),
        )
        content: dict[str, dict[str, Any]] = {
            "model": {"base": str(self.model), "dtype": "float32"},
            "adapter": {"rank": 2, "alpha": 4.0},
            "training": {"local_steps": 3, "batch_size": 4, "max_length": 64},
            "strategy": {"name": "fedavg"},
            **tables,
        }
        text = 'name = "sea"\n'
        for table, values in content.items():
            lines = [f"{key} = {json.dumps(value)}" for key, value in values.items()]
            text += "\n".join([f"\n[{table}]", *lines]) + "\n"
        (self.site / "federation.toml").write_text(text)

    def _join(self, name: str) -> None:
        folder = self.root / name
        folder.mkdir()
        rows = [
            {
                "question": f"{row} at {name}?",
                "answer": f"{row}.",
                "patient_id": f"{name}-{row // 2}",
            }
            for row in range(16 + 4 * CLINICS.index(name))
        ]
        for part, some in (("train", rows), ("valid", rows[:4])):
            text = "".join(json.dumps(row) + "\n" for row in some)
            (folder / f"{part}.jsonl").write_text(text)
        invitation, box = folder / "invitation.json", folder / "box"
        code, said = self.do(
            *("fedpeft-server", "invite", name, "--dir", str(self.site)),
            *("--out", str(invitation)),
        )
        assert code == 0, said
        code, said = self.do(
            *("fedpeft-client", "join", str(invitation), "--dir", str(box)),
            *("--train", str(folder / "train.jsonl"), "--valid", str(folder / "valid.jsonl")),
            *("--model", str(self.model)),
        )
        assert code == 0, said
        settings = (box / "client.toml").read_text()
        for setting, other in {
            "require_secagg = true": "require_secagg = false",
            'adversary = "active"': 'adversary = "curious"',
            'dtype = "auto"': 'dtype = "float32"',
            "min_free_disk_mb = 1024": "min_free_disk_mb = 0",
        }.items():
            assert settings.count(setting) == 1, setting
            settings = settings.replace(setting, other)
        (box / "client.toml").write_text(settings)


@contextlib.contextmanager
def town(
    root: Path,
    model: Path,
    settings: dict[str, dict[str, Any]],
    dies_at: Mapping[str, Mapping[str, str | int]] | None = None,
) -> Generator[Town]:
    """Make a site and three boxes, and let all four programs run; ``dies_at`` is by name."""
    nursery = Nursery()
    try:
        made = Town(root, model, nursery)
        made._make_site(settings)
        made.start(SERVER)
        deadline = time.monotonic() + _STARTED_S
        while "listening on" not in made.told(SERVER):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        for name in CLINICS:
            made._join(name)
        for name in CLINICS:
            made.start(name, (dies_at or {}).get(name))
        yield made
    finally:
        nursery.close()


def _digest_of(folder: Path) -> str:
    whole = sha256()
    for path in sorted(each for each in folder.rglob("*") if each.is_file()):
        whole.update(str(path.relative_to(folder)).encode())
        whole.update(sha256(path.read_bytes()).digest())
    return whole.hexdigest()
