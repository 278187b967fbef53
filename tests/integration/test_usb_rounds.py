"""Rounds by stick: a real server, real boxes, real files; lost, doubled, old, foreign, damaged."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

import fedpeft_client.cli
import fedpeft_server.cli
from fedpeft.errors import EnrolmentError, FedpeftError, StickRefused, StorageError
from fedpeft_server.sticks.post import StickPost

_BIN = Path(sys.executable).parent
_ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
_PATIENCE_S = 90.0


def client(*arguments: str | Path) -> None:
    fedpeft_client.cli.program.app([str(each) for each in arguments], standalone_mode=False)


def server(*arguments: str | Path) -> None:
    fedpeft_server.cli.program.app([str(each) for each in arguments], standalone_mode=False)


class Town:
    """A site and its boxes; sticks are folders."""

    def __init__(self, root: Path, confidentiality: str) -> None:
        self.root, self.site = root, root / "site"
        self.sealed = confidentiality == "sealed"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        server("init", self.site, "--address", f"localhost:{port}", "--name", "heart")
        path = self.site / "federation.toml"
        text = path.read_text()
        for name, value in {
            "rank": "2",
            "local_epochs": "1",
            "max_length": "64",
            "count": "1",
            "gather_s": "120.0",
            "confidentiality": f'"{confidentiality}"',
        }.items():
            text = re.sub(rf"^{name} = .*$", f"{name} = {value}", text, flags=re.MULTILINE)
        path.write_text(text)
        self.trips = 0

    def box(self, name: str) -> Path:
        return self.root / name

    def write_records(self, name: str) -> list[str]:
        options: list[str] = []
        for part in ("train", "valid"):
            rows = [
                {"question": f"{part} {n}?", "answer": f"{n} of {name}", "patient_id": f"{part}{n}"}
                for n in range(6)
            ]
            path = self.root / f"{name}-{part}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            options += [f"--{part}", str(path)]
        return options

    def join(self, name: str, *, by_stick: bool = True) -> None:
        invitation, request = self.root / f"{name}.json", self.root / f"{name}.request.json"
        server("invite", name, "--dir", self.site, "--out", invitation)
        options = ["--dir", str(self.box(name)), "--model", "embedded", *self.write_records(name)]
        if by_stick:
            client("join", invitation, *options, "--stick", request)
            server("admit", request, "--dir", self.site, "--out", self.root / f"{name}.ticket")
            client("ticket", self.root / f"{name}.ticket", self.box(name))
        else:
            client("join", invitation, *options)
        if self.sealed:
            settings = self.box(name) / "client.toml"
            text = settings.read_text().replace("require_secagg = true", "require_secagg = false")
            if "require_secagg = false" not in text:
                text += "\n[aggregation]\nrequire_secagg = false\n"
            settings.write_text(text)

    @contextmanager
    def running(self, program: str, *arguments: str | Path) -> Generator[subprocess.Popen[bytes]]:
        with (self.root / f"{program}.log").open("ab") as log:
            process = subprocess.Popen(
                [_BIN / program, *map(str, arguments)], stderr=log, stdout=log, env=_ENVIRONMENT
            )
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    def serving(self):
        return self.running("fedpeft-server", "start", self.site)

    def wait_for(self, purpose: str, clinics: int, number: int) -> None:
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            waiting = [
                each.context for each, _ in StickPost(self.site / "state").waiting().values()
            ]
            if [(one.purpose, one.round) for one in waiting] == [(purpose, number)] * clinics:
                return
            assert time.monotonic() < deadline, (waiting, self.log())
            time.sleep(0.1)

    def log(self) -> str:
        return (self.root / "fedpeft-server.log").read_text()

    def export(self, *names: str) -> list[Path]:
        self.trips += 1
        folder = self.root / f"trip{self.trips}"
        folder.mkdir()
        chosen = [option for name in names for option in ("--clinic", name)]
        server("round", "export", "--dir", self.site, "--out", folder, *chosen)
        return sorted(folder.glob("*.question.fedpeft"))

    def answer(self, question: Path) -> Path:
        name = question.name.split("-")[1]
        client("round", "run", question, "--dir", self.box(name))
        return question.with_name(question.name.replace(".question.", ".answer."))

    def bring(self, *answers: Path) -> None:
        server("round", "import", *answers, "--dir", self.site)

    def trip(self, purpose: str, clinics: int, number: int) -> list[Path]:
        self.wait_for(purpose, clinics, number)
        answers = [self.answer(each) for each in self.export()]
        self.bring(*answers)
        return answers

    def rounds(self) -> list[dict[str, object]]:
        paths = sorted((self.site / "run" / "rounds").glob("*/round.json"))
        return [json.loads(path.read_text()) for path in paths]


def ended(process: subprocess.Popen[bytes], town: Town) -> None:
    assert process.wait(_PATIENCE_S) == 0, town.log()


def refused(town: Town, capsys: pytest.CaptureFixture[str], files: Sequence[Path]) -> str:
    """What is said of files that are all refused."""
    capsys.readouterr()
    with pytest.raises(StickRefused, match="nothing was taken"):
        town.bring(*files)
    return " ".join(capsys.readouterr().err.split())


def test_all_by_stick_with_secure_aggregation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    town = Town(tmp_path, "secagg")
    names = ("anna", "bert", "clara")
    for name in names:
        town.join(name)
    capsys.readouterr()
    server("clinics", "--dir", town.site)
    assert capsys.readouterr().out.count("enrolled, by stick") == 3
    assert not town.export()
    stages = ("keys", "shares", "masked", "check", "unmask")

    with town.serving():
        first = town.trip("evaluate.keys", 3, 0)
        town.wait_for("evaluate.shares", 3, 0)
    # A sum ends with its server: what was exported before is of no use then.
    late = town.answer(_questions(town, "evaluate.shares")[0])
    assert "ended with the server that asked" in refused(town, capsys, [late])
    assert not town.export()
    with town.serving() as process:
        for stage in stages:
            town.trip(f"evaluate.{stage}", 3, 0)
        assert "was asked anew since" in refused(town, capsys, [late])
        assert "counts once" in refused(town, capsys, first)
        _box_is_killed_and_goes_on(town)
        for stage in stages[1:]:
            town.trip(f"train.{stage}", 3, 1)
        for stage in stages:
            town.trip(f"evaluate.{stage}", 3, 1)
        ended(process, town)

    (zero, one) = town.rounds()
    assert (zero["participants"], one["participants"]) == ([], sorted(names))
    assert not town.export()
    for name in names:
        opened = json.loads((town.box(name) / "sums" / "opened.json").read_text())["opened"]
        assert [each for rounds in opened.values() for each in rounds.get("train", [])] == [1]
        # Of the last sum only the answer is left.
        names_there = sorted(path.name for path in (town.box(name) / "sums").iterdir())
        assert names_there == ["opened.json", "sum"]
        client("audit-log", "verify", town.box(name))
    server("audit-log", "verify", town.site)
    capsys.readouterr()
    client("disclosures", town.box("anna"))
    assert "masked" in capsys.readouterr().out


def _questions(town: Town, purpose: str) -> list[Path]:
    """Questions that a stopped server left behind, as somebody took them along before it did."""
    found: list[Path] = []
    for question, content in StickPost(town.site / "state").waiting().values():
        if question.context.purpose == purpose:
            path = town.root / question.name
            path.write_bytes(content)
            found.append(path)
    return found


def _box_is_killed_and_goes_on(town: Town) -> None:
    """Kill -9 anna's box in training; the same file goes on, and is charged once."""
    town.wait_for("train.keys", 3, 1)
    questions = town.export()
    (anna,) = (each for each in questions if "-anna-" in each.name)
    box = town.box("anna")
    with town.running("fedpeft-client", "round", "run", anna, "--dir", box) as process:
        deadline = time.monotonic() + _PATIENCE_S
        while process.poll() is None and not any((box / "checkpoints").glob("*.checkpoint")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
    answers = [town.answer(each) for each in questions]
    before = answers[0].read_bytes()
    ledger = (town.root / "fedpeft-ledger.sqlite").stat().st_mtime_ns
    assert town.answer(questions[0]).read_bytes() == before
    assert (town.root / "fedpeft-ledger.sqlite").stat().st_mtime_ns == ledger
    town.bring(*answers)


def test_mixed_with_sealed_over_a_restart_and_with_bad_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    town = Town(tmp_path, "sealed")
    for name in ("anna", "bert"):
        town.join(name)
    with town.serving():
        _until_reachable(town)
        town.join("clara", by_stick=False)
        with town.running("fedpeft-client", "start", town.box("clara")):
            town.wait_for("evaluate", 2, 0)
        with pytest.raises(EnrolmentError, match="clinic clara is reached by network"):
            town.export("clara")
        lost, carried = town.export(), town.export()
        assert [one.read_bytes() for one in lost] == [one.read_bytes() for one in carried]
    zero = [town.answer(each) for each in carried]
    with (
        town.serving() as process,
        town.running("fedpeft-client", "start", town.box("clara")),
    ):
        _bad_files_are_refused(town, capsys, zero)
        one = town.trip("train", 2, 1)
        assert "is old" in _old(town, carried[0])
        assert "imported already" in refused(town, capsys, [zero[0], one[0]])
        town.trip("evaluate", 2, 1)
        ended(process, town)
    assert [each["participants"] for each in town.rounds()] == [[], ["anna", "bert", "clara"]]
    assert {len(each["per_clinic"]) for each in town.rounds()} == {3}  # pyright: ignore[reportArgumentType]
    capsys.readouterr()
    client("disclosures", town.box("anna"))
    assert "opens" in capsys.readouterr().out


def _until_reachable(town: Town) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while "listening on" not in town.log():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _old(town: Town, question: Path) -> str:
    with pytest.raises(StickRefused) as caught:
        town.answer(question)
    return str(caught.value)


def _bad_files_are_refused(
    town: Town, capsys: pytest.CaptureFixture[str], answers: list[Path]
) -> None:
    """The good ones of several are taken, also those to a question of before the restart."""
    content = answers[0].read_bytes()
    damaged, empty = town.root / "damaged.fedpeft", town.root / "empty.fedpeft"
    damaged.write_bytes(content[:-200] + b"\0" + content[-199:])
    empty.write_bytes(b"")
    (question, *_) = answers[0].parent.glob("*-anna-*.question.fedpeft")
    swapped = town.root / "swapped.fedpeft"
    swapped.write_bytes(content)
    _until_reachable(town)
    missing = town.root / "lost.fedpeft"
    capsys.readouterr()
    with pytest.raises(StickRefused, match="5 of 7 files") as caught:
        town.bring(damaged, *answers, empty, question, swapped, missing)
    said = " ".join(capsys.readouterr().err.split())
    assert caught.value.exit_code == 19
    for sentence in (
        "is damaged",
        "is no file of a fedpeft round",
        "is a question of the central site",
        "was imported already",
        "cannot read",
        "took ",
    ):
        assert sentence in said


def test_a_box_answers_one_program_at_a_time_and_its_own_questions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from fedpeft_client.box_lock import only_program

    town = Town(tmp_path, "sealed")
    for name in ("anna", "bert"):
        town.join(name)
    with pytest.raises(FedpeftError):
        client("ticket", town.root / "bert.ticket", town.box("anna"))
    with pytest.raises(StickRefused, match="is no file of a fedpeft round"):
        client("round", "run", town.root / "bert.ticket", "--dir", town.box("anna"))
    with only_program(town.box("anna")), pytest.raises(StorageError, match="another program"):
        client("round", "run", town.root / "bert.ticket", "--dir", town.box("anna"))
    with pytest.raises(StickRefused, match="not the file that is asked for"):
        server("admit", town.root / "bert.json", "--dir", town.site)
    server("carrier", "bert", "network", "--dir", town.site)
    capsys.readouterr()
    server("clinics", "--dir", town.site)
    assert capsys.readouterr().out.count("enrolled, by stick") == 1
