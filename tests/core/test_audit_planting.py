"""Planting: what is written, with which modes, and what is left alone."""

import json
import random
import stat
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from fedpeft.audit import AuditKey, Planting, plant, read_key
from fedpeft.data import RecordSet, read_records
from fedpeft.errors import ConfigError, DataError, FedpeftError, StorageError

PATIENTS = 30


class Tails(random.Random):
    """Every coin falls on tails; all else is as random as ever."""

    def random(self) -> float:
        return 0.9

    def getrandbits(self, k: int, /) -> int:
        return super().getrandbits(k)


def write_questions(path: Path, *, patients: bool = True) -> Path:
    rows = [
        {
            "question": f"how is patient {number // 3} on day {number % 3}?",
            "answer": f"day {number % 3} went well, pulse {number}",
            **({"patient_id": number // 3} if patients else {}),
        }
        for number in range(3 * PATIENTS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_texts(path: Path) -> Path:
    rows = [{"text": f"story {number} of a day", "label": "x"} for number in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def planted(data: Path, **changes: Any) -> tuple[AuditKey, RecordSet]:
    out, key = data.parent / "new" / "train.jsonl", data.parent / "secret" / "key.json"
    amounts: dict[str, Any] = {"canaries": 6, "share": 0.5, **changes}
    planting = Planting(**amounts)
    plant(data, out, key, planting, draw=random.Random(3))
    return read_key(key), read_records(out)


def contents(records: RecordSet) -> list[tuple[object, ...]]:
    return [(r.text, r.patient_id, *((t.role, t.text) for t in r.turns)) for r in records.records]


def test_every_planted_canary_is_there_as_often_as_the_key_says(tmp_path: Path):
    key, records = planted(write_questions(tmp_path / "qa.jsonl"))
    found = [(r.turns[0].text, r.turns[1].text) for r in records.records]
    for canary in key.canaries:
        expected = canary.repetitions if canary.included else 0
        assert found.count((canary.prompt, canary.secret)) == expected
    assert {canary.repetitions for canary in key.canaries} == {1, 4, 16}
    assert len({canary.prompt for canary in key.canaries}) == len(key.canaries) == 18


def test_the_copies_of_a_canary_are_one_new_patients(tmp_path: Path):
    data = write_questions(tmp_path / "qa.jsonl")
    key, records = planted(data)
    prompts = {canary.prompt for canary in key.canaries if canary.included}
    patients = {
        prompt: {r.patient_id for r in records.records if r.turns[0].text == prompt}
        for prompt in prompts
    }
    assert all(len(ids) == 1 for ids in patients.values())
    names = {name for ids in patients.values() for name in ids}
    assert len(names) == len(prompts)
    assert not names & {record.patient_id for record in read_records(data).records}


def test_held_out_patients_are_gone_with_all_their_records_and_nobody_else(tmp_path: Path):
    data = write_questions(tmp_path / "qa.jsonl")
    key, records = planted(data)
    gone = {row for unit in key.held if not unit.member for row in unit.rows}
    original = read_records(data)
    kept = [r for r in contents(records) if not str(r[1]).startswith("audit-")]
    rows = zip(original.records, contents(original), strict=True)
    assert sorted(map(str, kept)) == sorted(str(c) for r, c in rows if r.row not in gone)
    assert (key.unit, len(key.held)) == ("patient", PATIENTS // 2)
    assert all(len(unit.rows) == 3 for unit in key.held)
    assert 0 < len(gone) < 3 * PATIENTS // 2


def test_plain_texts_get_canaries_of_plain_text(tmp_path: Path):
    key, records = planted(write_texts(tmp_path / "texts.jsonl"))
    texts = [record.text for record in records.records]
    first = next(canary for canary in key.canaries if canary.included)
    assert texts.count(f"{first.prompt} {first.secret}") == first.repetitions
    assert (key.unit, key.conversation, records.patients) == ("record", False, None)
    assert {record.label for record in records.records} == {"x", None}


def test_the_original_is_not_touched(tmp_path: Path):
    data = write_questions(tmp_path / "qa.jsonl")
    before = data.read_bytes(), data.stat().st_mtime_ns
    planted(data)
    assert (data.read_bytes(), data.stat().st_mtime_ns) == before


def test_key_and_data_are_for_their_owner_only(tmp_path: Path):
    planted(write_questions(tmp_path / "qa.jsonl"))
    for path in (tmp_path / "secret" / "key.json", tmp_path / "new" / "train.jsonl"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_key_holds_nothing_of_a_real_record(tmp_path: Path):
    planted(write_questions(tmp_path / "qa.jsonl"))
    text = (tmp_path / "secret" / "key.json").read_text()
    assert "went well" not in text
    assert "how is patient" not in text


def test_coins_are_fair_and_secrets_are_not_repeated(tmp_path: Path):
    key, _ = planted(write_questions(tmp_path / "qa.jsonl"), canaries=100)
    assert 115 < sum(canary.included for canary in key.canaries) < 185
    assert len({canary.secret for canary in key.canaries}) == 300
    assert all(len(canary.secret) == 8 for canary in key.canaries)


def test_secure_randomness_differs_from_run_to_run(tmp_path: Path):
    data = write_questions(tmp_path / "qa.jsonl")
    for run in ("a", "b"):
        plant(data, tmp_path / f"{run}.jsonl", tmp_path / f"{run}.json", Planting(canaries=2))
    a, b = (read_key(tmp_path / f"{run}.json") for run in ("a", "b"))
    assert a.seed != b.seed
    assert {c.secret for c in a.canaries}.isdisjoint(c.secret for c in b.canaries)


# What is refused


def test_nothing_is_written_over(tmp_path: Path):
    data = write_questions(tmp_path / "qa.jsonl")
    with pytest.raises(StorageError, match=r"qa\.jsonl exists"):
        plant(data, data, tmp_path / "key.json")
    (tmp_path / "key.json").write_text("mine")
    with pytest.raises(StorageError, match=r"key\.json exists"):
        plant(data, tmp_path / "out.jsonl", tmp_path / "key.json")
    assert (tmp_path / "key.json").read_text() == "mine"
    assert not (tmp_path / "out.jsonl").exists()


def test_another_file_type_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="jsonl"):
        plant(write_questions(tmp_path / "qa.jsonl"), tmp_path / "out.csv", tmp_path / "key")


def test_holding_everybody_out_is_refused(tmp_path: Path):
    data = tmp_path / "one.jsonl"
    data.write_text('{"text": "one"}\n')
    with pytest.raises(DataError, match="all of them would be held out"):
        plant(data, tmp_path / "o.jsonl", tmp_path / "k", Planting(share=1.0), draw=Tails())


@pytest.mark.parametrize(
    "wrong",
    [{"canaries": 0}, {"repetitions": ()}, {"repetitions": (0,)}, {"digits": 3}, {"share": 2}],
)
def test_wrong_amounts_are_refused(wrong: dict[str, Any]):
    with pytest.raises(ConfigError):
        Planting(**wrong)


def damaged(path: Path, how: str) -> None:
    content = json.loads(path.read_text())
    if how == "cut":
        path.write_text(path.read_text()[:200])
    elif how == "schema":
        path.write_text(json.dumps({**content, "schema": 2}))
    elif how == "secret":
        content["canaries"][0]["secret"] = "TOPSECRET"
        path.write_text(json.dumps(content))
    elif how == "binary":
        path.write_bytes(b"\xff\xfe\x00")
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["cut", "schema", "secret", "binary", "gone"])
def test_a_key_that_cannot_be_used_is_told_in_one_sentence(how: str, tmp_path: Path):
    planted(write_questions(tmp_path / "qa.jsonl"))
    path = tmp_path / "secret" / "key.json"
    damaged(path, how)
    with pytest.raises(FedpeftError, match=r"key\.json") as caught:
        read_key(path)
    assert "\n" not in str(caught.value)
    assert "TOPSECRET" not in str(caught.value)


def test_no_secret_is_shown_when_a_key_is_printed(tmp_path: Path):
    key, _ = planted(write_questions(tmp_path / "qa.jsonl"))
    shown = repr(key) + str(key.canaries[0]) + repr(key.canaries)
    assert not any(canary.secret in shown for canary in key.canaries)
    with pytest.raises(ValidationError):
        key.seed = "x"  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("old", "new"),
    [('"included": true', '"included": false'), ('"member": true', '"member": false')],
)
def test_a_key_whose_coins_were_turned_is_noticed(tmp_path: Path, old: str, new: str) -> None:
    data, key = tmp_path / "data.jsonl", tmp_path / "audit.key"
    rows = ({"text": f"note {at}", "patient_id": str(at)} for at in range(40))
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    plant(data, tmp_path / "out.jsonl", key, Planting(canaries=8, share=1.0))
    assert read_key(key).canaries
    key.write_text(key.read_text("utf-8").replace(old, new, 1), "utf-8")
    with pytest.raises(DataError, match="does not fit its checksum"):
        read_key(key)
