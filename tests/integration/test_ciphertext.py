"""What Flower stores and moves, and what the wire carries, is ciphertext to whoever looks."""

import contextlib
import dataclasses
import json
import random
import shutil
import socket
import tempfile
import threading
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

import fedpeft.simulation.flower
import fedpeft_server.link.superlink
from fedpeft.config import FederationSettings
from fedpeft.simulation.plan import embedded_settings
from fedpeft.simulation.run import Simulation, simulate
from fedpeft_server.link.public_door import PublicDoor
from fedpeft_server.link.superlink import SuperLinkSettings
from fedpeft_server.runs.directory import RoundRecord

CANARY = "Canary-4711-Quokka"
NAMES = ("c1", "c2", "c3")
QUICK = (
    "training.local_steps=1",
    "training.schedule=constant",
    "training.warmup_steps=0",
    "rounds.count=1",
)
JOB_WORDS = (
    *(b"learning_rate", b"target_modules", b"local_steps", b"num-examples", b"all-linear"),
    # What an adapter and the parcel around it begin with, and what stands in its header.
    *(b"FPADAPT", b"FPPARC", b"kept_products", b"lora_A"),
)
WINDOWS, WINDOW_BYTES, LEAST_VALUES = 100, 16, 8


class Proxy:
    """Passes TCP connections on to another port of this machine and records every byte."""

    def __init__(self, port: int, target: int, record: Path) -> None:
        self._target = target
        self._record = record.open("ab")
        self._lock = threading.Lock()
        self._listening = socket.create_server(("127.0.0.1", port), backlog=64)
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    def _start(self, target: Callable[..., None], *arguments: Any) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listening.accept()
            except OSError:
                return
            self._start(self._serve, near)

    def _serve(self, near: socket.socket) -> None:
        with near, socket.create_connection(("127.0.0.1", self._target)) as far:
            back = threading.Thread(target=self._pass_on, args=(far, near), daemon=True)
            back.start()
            self._pass_on(near, far)
            back.join()

    def _pass_on(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 20):
                with self._lock:
                    self._record.write(data)
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        # A blocked accept() returns only after a shutdown.
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        for thread in self._threads:
            thread.join(10)
        with self._lock:
            self._record.close()


Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class RecordingDoor:
    """The server's door, with all bodies recorded that TLS hides from the proxy."""

    def __init__(self, record: Path, *arguments: Any, **named: Any) -> None:
        self._door = PublicDoor(*arguments, **named)
        self._record = record

    async def __call__(self, scope: Any, receive: Callable[[], Awaitable[Any]], send: Send) -> None:
        # A body comes in parts, and what is searched for may lie across two of them.
        came, went = bytearray(), bytearray()

        async def receiving() -> Any:
            event = await receive()
            came.extend(event.get("body", b""))
            return event

        async def sending(event: MutableMapping[str, Any]) -> None:
            went.extend(event.get("body", b""))
            await send(event)

        try:
            await self._door(scope, receiving, sending)
        finally:
            with self._record.open("ab") as record:
                record.write(came + went)


@dataclasses.dataclass
class Copies:
    """A watcher that copies Flower's database whenever clinics are asked, and after each round."""

    private: Path
    into: Path
    count: int = 0
    log_files: int = 0

    def waiting(self, connected: int, enrolled: int, minimum: int) -> None: ...

    def asked(self, number: int, kind: str, clinics: list[str]) -> None:
        self._copy(f"{number}-{kind}")

    def finished(self, records: list[RoundRecord]) -> None: ...

    def warned(self, sentence: str) -> None:
        raise AssertionError(sentence)

    def round_repeated(self, number: int, why: str) -> None:
        raise AssertionError(why)

    def round_finished(self, record: RoundRecord) -> None:
        assert record.failed == ()
        self._copy(f"{record.round}-finished")

    def _copy(self, when: str) -> None:
        (database,) = self.private.glob("fedpeft-*/server/flower.db")
        for path in sorted(database.parent.glob("flower.db*")):
            if path.name.endswith("-shm"):
                continue
            shutil.copyfile(path, self.into / f"{self.count:02}-{when}-{path.name}")
            self.log_files += path.name.endswith(("-wal", "-journal"))
        self.count += 1


def canary_federation(data: Path, *overrides: str) -> FederationSettings:
    """Settings of three clinics in whose every record the canary stands."""
    data.mkdir()
    entries: list[dict[str, str]] = []
    for number, name in enumerate(NAMES):
        rows = [
            {
                "patient_id": f"{CANARY}-{name}-{row}",
                "question": f"What does {CANARY} need on day {row + number}?",
                "answer": f"{CANARY} needs {row + 3} tablets a day.",
            }
            for row in range(24)
        ]
        for split, part in (("train", rows[:16]), ("valid", rows[16:])):
            text = "".join(json.dumps(row) + "\n" for row in part)
            (data / f"{name}-{split}.jsonl").write_text(text, "utf-8")
        files = {split: f"{name}-{split}.jsonl" for split in ("train", "valid")}
        entries.append({"name": name, **files})
    content = embedded_settings([*QUICK, *overrides]).model_dump(mode="json")
    return FederationSettings.model_validate({**content, "clinic": entries})


def floats_of(adapter: Path) -> dict[str, Any]:
    return load_file(adapter / "adapter_model.safetensors")


def windows_of(values: dict[str, Any], seed: int) -> list[bytes]:
    """Random windows of the floats' bytes, without the repetitive ones that occur anywhere."""
    rng = random.Random(seed)
    whole = [values[name].tobytes() for name in sorted(values)]
    found: list[bytes] = []
    while len(found) < WINDOWS:
        tensor = rng.choice(whole)
        start = rng.randrange(0, len(tensor) - WINDOW_BYTES)
        window = tensor[start : start + WINDOW_BYTES]
        if len(set(window)) >= LEAST_VALUES:
            found.append(window)
    return found


def found_in(path: Path, secrets: list[bytes]) -> list[bytes]:
    content = path.read_bytes()
    return [secret for secret in secrets if secret in content]


@dataclasses.dataclass(frozen=True)
class Capture:
    """Everything that was seen of one run, and the windows of its adapters."""

    out: Path
    stores: list[Path]
    proxied: Path
    inside_tls: Path
    windows: list[bytes]
    copies: Copies


def capture_run(root: Path, *overrides: str) -> Capture:
    """Run three clinics over the network with somebody in every place where messages pass."""
    for name in ("private", "stores"):
        (root / name).mkdir()
    settings = canary_federation(root / "data", *overrides)
    proxied, inside = root / "proxied.bin", root / "inside-tls.bin"
    proxies: list[Proxy] = []

    def behind_a_proxy(*, port: int, **named: Any) -> SuperLinkSettings:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            hidden = int(probe.getsockname()[1])
        proxies.append(Proxy(port, hidden, proxied))
        return SuperLinkSettings(port=hidden, **named)

    def door(*arguments: Any, **named: Any) -> RecordingDoor:
        return RecordingDoor(inside, *arguments, **named)

    copies = Copies(root / "private", root / "stores")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(root / "private"))
        patch.setattr(fedpeft.simulation.flower, "SuperLinkSettings", behind_a_proxy)
        patch.setattr(fedpeft_server.link.superlink, "PublicDoor", door)
        try:
            simulate(Simulation(settings, root / "data", root / "out", "flower"), copies)
        finally:
            for proxy in proxies:
                proxy.close()
    start, final = (floats_of(root / "out" / "rounds" / str(n) / "adapter") for n in (0, 1))
    change = {name: final[name] - start[name] for name in start}
    windows = [
        window
        for seed, values in enumerate((start, final, change))
        for window in windows_of(values, seed)
    ]
    return Capture(
        root / "out", sorted((root / "stores").iterdir()), proxied, inside, windows, copies
    )


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Capture:
    return capture_run(tmp_path_factory.mktemp("ciphertext"))


def test_the_search_can_fail(seen: Capture, tmp_path: Path) -> None:
    adapters = [
        seen.out / "rounds" / str(n) / "adapter" / "adapter_model.safetensors" for n in (0, 1)
    ]
    assert found_in(adapters[0], seen.windows[:WINDOWS]) == seen.windows[:WINDOWS]
    assert found_in(adapters[1], seen.windows[WINDOWS : 2 * WINDOWS])
    leaked = tmp_path / "leaked"
    leaked.write_bytes(seen.stores[-1].read_bytes() + adapters[0].read_bytes() + JOB_WORDS[0])
    assert found_in(leaked, [*seen.windows, *JOB_WORDS])
    (record,) = (seen.out.parent / "data").glob("c1-train.jsonl")
    assert found_in(record, [CANARY.encode()])


def test_the_database_held_messages_that_are_ciphertext(seen: Capture) -> None:
    # Two evaluations and a training: each asked about once and in five stages.
    assert seen.copies.count == 3 * 6 + 2
    assert seen.copies.log_files > 0
    assert max(path.stat().st_size for path in seen.stores) > 1 << 20
    # Stored as they were sent, or nothing would be found whatever was in them.
    assert sum(bool(found_in(path, [b"FPSEAL"])) for path in seen.stores) >= 10
    secrets = [CANARY.encode(), *JOB_WORDS, *seen.windows]
    assert {path.name: hit for path in seen.stores if (hit := found_in(path, secrets))} == {}


def test_the_wire_carries_ciphertext_even_inside_tls(seen: Capture) -> None:
    assert found_in(seen.inside_tls, [b"FPSEAL"])
    assert not found_in(seen.proxied, [b"FPSEAL"])
    secrets = [CANARY.encode(), *JOB_WORDS, *seen.windows]
    for record in (seen.inside_tls, seen.proxied):
        # Three clinics each fetched the adapter before and after training, and sent a vector.
        assert record.stat().st_size > 3 << 20
        assert found_in(record, secrets) == []


def test_the_logs_and_the_summary_tell_of_no_record_and_no_adapter(seen: Capture) -> None:
    logs = sorted((seen.out / "logs").glob("*.log"))
    assert [path.stem for path in logs] == list(NAMES)
    assert all(path.stat().st_size > 0 for path in logs)
    rounds = sorted(seen.out.glob("rounds/*/round.json"))
    for path in (*logs, *rounds, seen.out / "summary.json", seen.out / "run.json"):
        assert found_in(path, [CANARY.encode(), *seen.windows]) == []
