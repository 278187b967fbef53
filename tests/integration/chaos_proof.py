"""What must hold after chaos: each function asserts one property of what is left on the disks."""

import datetime
import json
import sqlite3
from collections import Counter
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch

from fedpeft.adapters import AdapterState, load_adapter
from fedpeft.audit_log import Entry, all_lines, entries_in
from fedpeft.audit_log.display import Choice
from fedpeft.config import FederationSettings, load_settings
from fedpeft.models import adapter_schema, fingerprint
from fedpeft.protocol import Job, SumTerms
from fedpeft.protocol.lineage_check import check_directory
from fedpeft.protocol.parcel import Held
from fedpeft_client.box import open_box
from fedpeft_client.rounds.clinic import Clinic
from fedpeft_client.rounds.work import Assignment, ClinicWork
from fedpeft_server.runs.directory import RoundRecord
from fedpeft_server.site.directory import open_site
from tests.integration.chaos_federation import (
    CANARY,
    CLINICS,
    PATIENT,
    SERVER,
    STEPS,
    ChaosFederation,
    digest_of,
)

# The update leaves in one of these, under ``sealed`` and in a secure sum.
_UPDATES = ("train", "train.masked")


def records(made: ChaosFederation) -> list[RoundRecord]:
    """Return what happened in the finished rounds, from round 0 on."""
    places = sorted(made.rounds.glob("[0-9]*"), key=lambda each: int(each.name))
    return [RoundRecord.model_validate_json((each / "round.json").read_bytes()) for each in places]


def assert_all_rounds_finished(made: ChaosFederation, count: int) -> None:
    summary = json.loads((made.site / "run" / "summary.json").read_text())
    assert [each["round"] for each in summary["rounds"]] == list(range(1, count + 1))
    assert [each.round for each in records(made)] == list(range(count + 1))


def assert_rounds_are_as_they_were(made: ChaosFederation) -> None:
    """Every round is what it was when it was finished, and what the server signed."""
    found = {number: digest_of(made.rounds / str(number)) for number in made.first_seen}
    assert found == made.first_seen
    assert len(found) == len(records(made))
    signer = open_site(made.site).sealing.public
    for number in found:
        ancestry = check_directory(made.rounds / str(number) / "adapter", signer)
        assert ancestry.unchecked is None
        assert list(ancestry.checked) == list(range(number - 1, -1, -1))
    code, told = made.do(
        *("fedpeft-client", "verify", str(made.site / "run" / "adapter")),
        *("--dir", str(made.box(CLINICS[0]))),
    )
    assert code == 0, told


def assert_nobody_counts_twice(made: ChaosFederation) -> None:
    """Who is named for a round sent one update in the attempt that counted, and no other did.

    What the server's log says came, the clinic's log says it sent, in the same words.
    """
    sent = {name: _updates(made.box(name), "message-out") for name in CLINICS}
    came = entries_of(made.site)
    for record in records(made)[1:]:
        done = max(
            each.seq
            for each in came
            if each.kind == "adapter" and each.about["round"] == record.round
        )
        updates = [
            each
            for each in came
            if each.seq < done and _is_update(each, "message-in", record.round)
        ]
        run, attempt = updates[-1].about["run"], updates[-1].about["attempt"]
        counted = [each for each in updates if _place(each) == (run, attempt)]
        names = [str(each.about["with"]).removeprefix("clinic:") for each in counted]
        assert sorted(names) == sorted(record.participants)
        assert len(set(record.participants)) == len(record.participants)
        for each, name in zip(counted, names, strict=True):
            digest = each.about["sha256"]
            assert [_place(one) for one in sent[name] if one.about["sha256"] == digest] != []


def assert_adapters_are_the_means(made: ChaosFederation) -> None:
    """Every round is the mean, by rows, of what its clinics compute anew from the one before."""
    settings = load_settings(FederationSettings, made.site / "federation.toml")
    schema = adapter_schema(made.model, settings.adapter)
    run = json.loads((made.site / "run" / "run.json").read_text())["id"]
    clinics = {name: _clinic_anew(made, name) for name in CLINICS}
    work = ClinicWork()
    for record in records(made)[1:]:
        before = load_adapter(made.rounds / str(record.round - 1) / "adapter", schema)
        after = load_adapter(made.rounds / str(record.round) / "adapter", schema)
        job = Job(
            federation=settings.name,
            run=run,
            fingerprint=fingerprint(made.model),
            quantization=settings.model.quantization,
            adapter=settings.adapter,
            training=settings.training,
            aggregation=SumTerms(confidentiality="sealed", adversary="curious", bits=16, limit=1.0),
            round=record.round,
            rounds=settings.rounds.count,
        )
        total, rows = torch.zeros_like(before.values), 0
        for name in record.participants:
            trained = work.train(clinics[name], Assignment(job, Held(before), schema.hash, 1))
            total += trained.rows * trained.update.values
            rows += trained.rows
        expected = AdapterState(schema, before.values + total / rows)
        changed = float((after.values - before.values).abs().max())
        off = float((after.values - expected.values).abs().max())
        assert off <= 1e-5 * changed, (record.round, off, changed)


def _clinic_anew(made: ChaosFederation, name: str) -> Clinic:
    """Return the clinic with its records, but with nothing that it remembers."""
    box = open_box(made.box(name))
    clinic = box.clinic(box.load_identity(lambda: ""))
    ledger = made.root / name / "anew.sqlite"
    return replace(clinic, ledger=ledger, checkpoint_directory=None)


def assert_ledgers_are_never_behind(made: ChaosFederation) -> None:
    """Before an update left a box, its ledger had charged all steps of that round."""
    assert sum(len(_updates(made.box(name), "message-out")) for name in CLINICS) >= 3
    for name in CLINICS:
        code, told = made.do("fedpeft-client", "ledger", "verify", str(made.box(name)))
        assert code == 0, told
        charges = _charges(open_box(made.box(name)).ledger_path)
        sent = _updates(made.box(name), "message-out")
        for each in sent:
            before = [
                step
                for time, number, step in charges
                if number == each.about["round"] and time <= _moment(each.time)
            ]
            assert set(before) == set(range(1, STEPS + 1)), (name, each)
        for each in entries_of(made.box(name)):
            if each.kind == "charge":
                told_steps = each.about["steps"]
                assert isinstance(told_steps, int)
                assert told_steps <= sum(time <= _moment(each.time) for time, _, _ in charges)


def assert_logs_are_whole(made: ChaosFederation) -> None:
    for program, place in (
        ("fedpeft-server", made.site),
        *(("fedpeft-client", made.box(name)) for name in CLINICS),
    ):
        code, told = made.do(program, "audit-log", "verify", str(place))
        assert code == 0, told


def assert_nothing_was_told_that_should_not_be(made: ChaosFederation) -> None:
    """No program met a defect, and no log, message or state of any has the text of a record."""
    outputs = [each for each in made.output(SERVER).parent.rglob("*") if each.is_file()]
    for path in outputs:
        text = path.read_text("utf-8", errors="replace")
        for word in ("Traceback", "defect of fedpeft", "internal-error", "Exception"):
            assert word not in text, (path, word)
    secrets = (CANARY.encode(), PATIENT.encode())
    records_of_ours = {CANARY.encode() in made.records(name).read_bytes() for name in CLINICS}
    assert records_of_ours == {True}
    kept = [made.box(name) for name in CLINICS]
    kept += [made.site]
    files = [path for place in kept for path in place.rglob("*") if path.is_file()]
    leaks = [path for path in (*outputs, *files) if any(it in path.read_bytes() for it in secrets)]
    assert leaks == []


def entries_of(directory: Path) -> list[Entry]:
    """Return the entries of the audit log of a box or a site."""
    return list(entries_in(all_lines(directory / "audit"), Choice()))


def reasons_of(made: ChaosFederation) -> Counter[str]:
    """Return how often which reason stood in the place of an answer."""
    return Counter(
        str(each.about["reason"])
        for each in entries_of(made.site)
        if each.kind == "message-in" and "reason" in each.about
    )


def _updates(directory: Path, kind: str) -> list[Entry]:
    return [each for each in entries_of(directory) if _is_update(each, kind)]


def _is_update(entry: Entry, kind: str, number: int | None = None) -> bool:
    about = entry.about
    return (
        entry.kind == kind
        and about["type"] in _UPDATES
        and "reason" not in about
        and about.get("mode") == ("secagg" if about["type"] == "train.masked" else "sealed")
        and (number is None or about["round"] == number)
    )


def _place(entry: Entry) -> tuple[object, object]:
    return entry.about["run"], entry.about["attempt"]


def _charges(ledger: Path) -> list[tuple[datetime.datetime, int, int]]:
    with closing(sqlite3.connect(ledger)) as database:
        query = "SELECT time, round, step FROM entries WHERE kind = 'charge' ORDER BY seq"
        return [(_moment(time), number, step) for time, number, step in database.execute(query)]


def _moment(time: str) -> datetime.datetime:
    return datetime.datetime.fromisoformat(time)
