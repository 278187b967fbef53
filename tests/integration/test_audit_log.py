"""A real federation with faults: its logs prove what happened, and tell of no record."""

import base64
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import tomllib
import traceback
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fedpeft.audit_log import Choice, Entry, all_lines, entries_in, verify
from fedpeft.config import KeySettings
from fedpeft.console import Program
from fedpeft.protocol.lineage_check import check_directory
from fedpeft_client.box import open_box
from fedpeft_client.cli import program as client
from fedpeft_server.cli import program as server
from fedpeft_server.site.directory import create_site, open_site

HEALTHY, BAD_ROWS, CRASHING, REFUSING = ("quay", "ridge"), "bay", "cape", "delta"
NAMES = (*HEALTHY, BAD_ROWS, CRASHING, REFUSING)
CANARY, PATIENT, ACCENTED = "Quokka-4711-Canary", "patient-Zebra-0815", "Müller-Ångström-99"

# Everything at DEBUG level, as somebody looking for a fault would have it.
_DEBUG = """
import atexit, logging, sys
logging.basicConfig(level=logging.DEBUG, format="%(name)s %(levelname)s %(message)s")
atexit.register(logging.getLogger("end").debug, "everything was logged")
"""
_SERVER = _DEBUG + "from fedpeft_server.cli import program\nprogram.run(sys.argv[1:])\n"
_CLIENT = _DEBUG + "from fedpeft_client.cli import program\nprogram.run(sys.argv[1:])\n"
# A defect anywhere in training: its text, its cause and its locals hold a record.
_CRASHING = (
    _DEBUG
    + """
import fedpeft_client.rounds.learning as learning
def train(model, examples, *rest):
    record = open(sys.argv.pop()).read()
    try:
        raise KeyError(record)
    except KeyError as error:
        raise RuntimeError("cannot train on " + record) from error
learning.train = train
from fedpeft_client.cli import program
program.run(sys.argv[1:3])
"""
)


def write_rows(folder: Path, name: str) -> tuple[Path, Path]:
    rows = [
        {
            "question": f"What does {CANARY} of {name} take, row {row}?",
            "answer": f"{ACCENTED} takes {CANARY}.",
            "patient_id": f"{PATIENT}-{row // 2}",
        }
        for row in range(10)
    ]
    lines = [json.dumps(row, ensure_ascii=row["patient_id"][-1] == "0") for row in rows]
    valid = folder / f"{name}-valid.jsonl"
    valid.write_text("\n".join(lines[:4]) + "\n", "utf-8")
    if name == BAD_ROWS:
        lines[3] = json.dumps({"question": CANARY, "patient_id": PATIENT})
        lines[5] = f'{{"question": "{CANARY}", "answer": '
    train = folder / f"{name}-train.jsonl"
    train.write_text("\n".join(lines) + "\n", "utf-8")
    return train, valid


@dataclass(frozen=True)
class Held:
    """What is left of a federation: the site, the boxes, the records, and what was printed."""

    root: Path

    @property
    def site(self) -> Path:
        return self.root / "site"

    @property
    def records(self) -> Path:
        return self.root / "records"

    @property
    def outputs(self) -> Path:
        return self.root / "outputs"

    def box(self, name: str) -> Path:
        return self.root / "boxes" / name

    def entries(self, directory: Path, kind: str | None = None) -> list[Entry]:
        return list(entries_in(all_lines(directory / "audit"), Choice(kind=kind)))


def command(*arguments: str) -> None:
    client.app(list(arguments), standalone_mode=False)


@contextlib.contextmanager
def running(code: str, output: Path, *arguments: str) -> Generator["subprocess.Popen[bytes]"]:
    with output.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            cwd=output.parent,
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def make_site(root: Path, model: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    create_site(
        root / "site", address=f"127.0.0.1:{port}", name="sea", base=str(model), keys=KeySettings()
    )
    (root / "site" / "federation.toml").write_text(
        f"""name = "sea"
[model]
base = {json.dumps(str(model))}
[adapter]
rank = 4
alpha = 8.0
[training]
local_steps = 2
batch_size = 4
max_length = 96
[rounds]
count = 2
minimum_clinics = 2
wait_s = 300
gather_s = 300
retries = 0
[strategy]
name = "fedavg"
[aggregation]
confidentiality = "sealed"
"""
    )


def wait_for(output: Path, text: str, timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while text not in output.read_text("utf-8", errors="replace"):
        assert time.monotonic() < deadline, output.read_text("utf-8", errors="replace")[-3000:]
        time.sleep(0.2)


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Held:
    """Run two rounds of five clinics, of which three cannot take part, each for its reason."""
    held = Held(tmp_path_factory.mktemp("audited"))
    for folder in (held.records, held.outputs):
        folder.mkdir()
    make_site(held.root, tiny_model)
    site = open_site(held.site)
    with contextlib.ExitStack() as stack:
        server_output = held.outputs / "server"
        process = stack.enter_context(running(_SERVER, server_output, "start", str(held.site)))
        for name in NAMES:
            invitation = held.root / f"{name}.json"
            site.enrolments().create_invitation(name, 3600, fingerprint=site.fingerprint()).write(
                invitation
            )
        wait_for(server_output, "listening on")
        for name in NAMES:
            train, valid = write_rows(held.records, name)
            box = held.box(name)
            files = ["--train", str(train), "--valid", str(valid), "--model", str(tiny_model)]
            command("join", str(held.root / f"{name}.json"), "--dir", str(box), *files)
            settings = (box / "client.toml").read_text()
            if name != REFUSING:
                settings = settings.replace("require_secagg = true", "require_secagg = false")
                assert not tomllib.loads(settings)["aggregation"]["require_secagg"]
            (box / "client.toml").write_text(settings)
        for name in NAMES:
            arguments = ["start", str(held.box(name))]
            arguments += [str(held.records / f"{name}-train.jsonl")] if name == CRASHING else []
            code = _CRASHING if name == CRASHING else _CLIENT
            stack.enter_context(running(code, held.outputs / name, *arguments))
        assert process.wait(420) == 0, server_output.read_text()[-3000:]
    return held


# No record in any log


def forms_of(text: str) -> set[bytes]:
    """The ways in which a text may stand in a file."""
    found = {text.encode(), text.encode("utf-16-le"), text.encode("unicode_escape")}
    found |= {
        json.dumps(text)[1:-1].encode(),
        repr(text)[1:-1].encode(),
        ascii(text)[1:-1].encode(),
    }
    for lead in range(3):
        # The middle of base64, whatever stands before and after it.
        coded = base64.b64encode(b"\0" * lead + text.encode())
        found.add(coded[4 if lead else 0 : -4])
    return found


SECRETS = frozenset().union(*map(forms_of, (CANARY, PATIENT, ACCENTED)))


def leaks_in(paths: list[Path]) -> dict[str, list[bytes]]:
    found: dict[str, list[bytes]] = {}
    for path in paths:
        data = path.read_bytes()
        if hits := [secret for secret in SECRETS if secret in data]:
            found[str(path)] = hits
    return found


def files_under(*folders: Path) -> list[Path]:
    return [path for each in folders for path in sorted(each.rglob("*")) if path.is_file()]


def test_the_search_for_records_can_fail(held: Held, tmp_path: Path) -> None:
    records = files_under(held.records)
    assert set(leaks_in(records)) == {str(path) for path in records}
    # What a careless handler would have written of the very defect that was put in.
    try:
        raise RuntimeError("cannot train on " + records[0].read_text("utf-8"))
    except RuntimeError:
        (tmp_path / "crash").write_text(traceback.format_exc(), "utf-8")
    for coded, name in ((base64.b64encode, "coded"), (lambda data: repr(data).encode(), "repr")):
        (tmp_path / name).write_bytes(b"x" + coded(b"xy" + records[0].read_bytes()))
    assert len(leaks_in(files_under(tmp_path))) == 3


def test_the_faults_did_happen(held: Held) -> None:
    told = {name: (held.outputs / name).read_text("utf-8") for name in NAMES}
    assert "RuntimeError at " in told[CRASHING]
    assert re.search(r"row|line", told[BAD_ROWS])
    assert "require_secagg" in told[REFUSING]
    assert all("end DEBUG everything was logged" in text for text in told.values())
    summary = json.loads((held.site / "run" / "summary.json").read_text())
    failed = {(one["clinic"], one["reason"]) for one in summary["rounds"][0]["failed"]}
    assert failed == {
        (BAD_ROWS, "bad-data"), (CRASHING, "internal-error"), (REFUSING, "secagg-required"),
    }  # fmt: skip


def test_no_log_no_error_and_no_file_tells_of_a_record(held: Held) -> None:
    paths = files_under(held.outputs, held.site, held.root / "boxes")
    assert {path.name for path in paths} >= {"server", *NAMES, "000001.jsonl", "flower.db"}
    assert leaks_in(paths) == {}


def test_the_audit_logs_hold_no_path_and_no_secret(held: Held) -> None:
    for directory in (held.site, *map(held.box, NAMES)):
        text = b"".join(path.read_bytes() for path in files_under(directory / "audit"))
        assert str(held.root).encode() not in text
        assert b".jsonl" not in text
        for key in directory.rglob("identity.key"):
            assert json.loads(key.read_text())["seeds"].encode() not in text


# What the logs prove


def test_all_logs_are_whole_and_signed_to_their_end(held: Held) -> None:
    keepers = {held.box(name): open_box(held.box(name)).load_identity(str).public for name in NAMES}
    keepers[held.site] = open_site(held.site).sealing.public
    for directory, keeper in keepers.items():
        verdict = verify(directory / "audit", identity=keeper)
        assert verdict.problems == ()
        assert verdict.end.seq == verdict.signed + 1


def test_both_sides_name_the_same_messages(held: Held) -> None:
    def sealed(directory: Path, kind: str, other: str) -> list[tuple[Any, ...]]:
        return [
            tuple(entry.about[name] for name in ("type", "round", "mode", "bytes", "sha256"))
            for entry in held.entries(directory, kind)
            if entry.about["with"] == other
        ]

    for name in NAMES:
        role = f"clinic:{name}"
        left = sealed(held.box(name), "message-out", "server")
        assert left
        assert sealed(held.site, "message-in", role) == left
        assert sealed(held.site, "message-out", role) == sealed(
            held.box(name), "message-in", "server"
        )


def test_every_decision_stands_in_the_log_by_its_rule_alone(held: Held) -> None:
    rules = {
        name: {
            (entry.about["verdict"], entry.about["rule"])
            for entry in held.entries(held.box(name), "decision")
        }
        for name in NAMES
    }
    assert rules[HEALTHY[0]] == {("accepted", "policy")}
    assert rules[REFUSING] == {("refused", "secagg-required")}
    assert rules[BAD_ROWS] == {("accepted", "policy"), ("refused", "bad-data")}
    words = {entry.about.get("reason") for entry in held.entries(held.box(CRASHING), "message-out")}
    assert words == {None, "internal-error"}


def test_start_and_stop_and_enrolment_stand_in_the_logs(held: Held) -> None:
    for directory in (held.site, *map(held.box, NAMES)):
        assert len(held.entries(directory, "start")) == 1
        (stop,) = held.entries(directory, "stop")
        assert stop.about["reason"] == ("finished" if directory == held.site else "asked")
    events = [entry.about["event"] for entry in held.entries(held.box("quay"), "key")]
    assert events == ["joining", "joined"]
    found = [(e.about["event"], e.about["name"]) for e in held.entries(held.site, "key")]
    assert sorted(found) == sorted((event, n) for n in NAMES for event in ("invited", "enrolled"))


# Lineage


def test_the_lineage_names_the_clinics_whose_updates_made_the_adapter(held: Held) -> None:
    server = open_site(held.site).sealing.public
    found = check_directory(held.site / "run" / "adapter", server)
    assert (found.checked, found.unchecked) == ((1, 0), None)
    lineage = found.signed.lineage
    fingerprints = {
        name: open_box(held.box(name)).load_identity(str).public.fingerprint for name in HEALTHY
    }
    assert lineage.of_round() == list(HEALTHY)
    assert {name: one.fingerprint for name, one in lineage.clinics.items()} == fingerprints
    assert {one.rounds for one in lineage.clinics.values()} == {"1-2"}


def test_the_server_log_names_each_lineage_before_a_clinic_was_sent_the_adapter(held: Held) -> None:
    made = [entry for entry in held.entries(held.site) if entry.kind in ("adapter", "message-out")]
    for number in (0, 1, 2):
        place = held.site / "run" / "rounds" / str(number) / "adapter"
        signed = check_directory(place, open_site(held.site).sealing.public).signed
        (named,) = [e for e in made if e.kind == "adapter" and e.about["round"] == number]
        assert named.about["lineage"] == signed.digest
        assert signed.lineage.log is not None
        assert signed.lineage.log.hash == named.previous
        sent = [
            entry.seq
            for entry in made
            if entry.about.get("type") == "evaluate" and entry.about.get("round") == number
        ]
        assert sent
        assert named.seq < min(sent)


def test_a_box_keeps_the_lineage_and_checks_it_against_its_server(
    held: Held, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in HEALTHY:
        box = held.box(name)
        command("verify", str(box / "adapter"), "--dir", str(box))
        told = capsys.readouterr().out
        assert "the updates of quay, ridge, on the adapter of round 1" in told
        assert "no differential privacy" in told


# Disclosures


def test_disclosures_say_what_left_and_agree_with_the_ledger(
    held: Held, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    command("disclosures", str(held.box("quay")), "--html", str(page))
    told = capsys.readouterr().out
    assert "doubt" not in told
    assert "the central site opens this clinic's update by itself" in told
    assert "rounds 1 to 2" in told
    assert "trained without differential privacy" in told
    size = sum(e.about["bytes"] for e in held.entries(held.box("quay"), "message-out"))  # type: ignore[misc]
    assert f"{size / 1000:,.1f} kB" in told
    text = page.read_text("utf-8")
    assert "The list is complete." in text
    assert page.stat().st_mode & 0o777 == 0o600
    command("disclosures", str(held.box(REFUSING)))
    assert "secagg-required" in capsys.readouterr().out


def test_a_box_whose_log_was_removed_is_found_out_by_its_ledger(
    held: Held, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    box = Path(shutil.copytree(held.box("ridge"), tmp_path / "ridge", symlinks=True))
    ledger = held.root / "boxes"
    for path in ledger.glob("fedpeft-ledger*"):
        shutil.copy(path, tmp_path / path.name)
    shutil.rmtree(box / "audit")
    with contextlib.suppress(SystemExit):
        command("disclosures", str(box))
    told = capsys.readouterr().out
    assert "of which this audit log knows nothing" in told


def test_a_box_whose_log_was_edited_does_not_start(held: Held, tmp_path: Path) -> None:
    import shutil

    from fedpeft.errors import AuditLogDamaged

    box = Path(shutil.copytree(held.box("ridge"), tmp_path / "ridge", symlinks=True))
    path = box / "audit" / "000001.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"round":1', b'"round":9'))
    for arguments in (["start", str(box)], ["audit-log", "verify", str(box)]):
        with pytest.raises(AuditLogDamaged):
            command(*arguments)
    done = subprocess.run(
        [sys.executable, "-m", "fedpeft_client", "disclosures", str(box)],
        capture_output=True,
        text=True,
        env={**os.environ},
    )
    assert done.returncode == AuditLogDamaged.exit_code
    assert "doubt\tthe audit log is damaged" in done.stdout


def test_the_commands_show_check_and_export_what_both_sides_did(
    held: Held, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for program_of, place, kind in (
        (client, held.box("quay"), "charge"),
        (server, held.site, "adapter"),
    ):

        def told(*arguments: str, run: Program = program_of) -> list[str]:
            run.app(["audit-log", *arguments], standalone_mode=False)
            return capsys.readouterr().out.splitlines()

        shown = [json.loads(line) for line in told("show", str(place), "--json")]
        assert [entry["seq"] for entry in shown] == list(range(1, len(shown) + 1))
        chosen = told("show", str(place), "--kind", kind)
        assert len(chosen) == sum(entry["kind"] == kind for entry in shown) >= 2
        end = next(line for line in told("verify", str(place)) if line.startswith("end\t"))
        out = tmp_path / f"{kind}.jsonl"
        told("export", str(place), "--out", str(out))
        assert end in told("verify", str(out), "--kept", end.removeprefix("end\t"))
