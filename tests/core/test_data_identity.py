"""Who is in a data set does not depend on spelling, order or file, and no id is left readable."""

import json
from pathlib import Path

import pytest

from fedpeft.data import read_records, unit_keys

DECOMPOSED, COMPOSED = "Jose\u0301", "Jos\u00e9"


def keys_of(path: Path, *ids: object, text: str = "yes") -> tuple[str, ...]:
    rows = [{"question": f"q{at}", "answer": text, "patient_id": one} for at, one in enumerate(ids)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return unit_keys(read_records(path))


@pytest.mark.parametrize("other", ["P1 ", " P1", "\tP1"])
def test_spaces_around_an_id_make_no_other_patient(tmp_path: Path, other: str):
    assert keys_of(tmp_path / "a.jsonl", "P1", other) == keys_of(tmp_path / "b.jsonl", "P1")


def test_the_encoding_of_accents_makes_no_other_patient(tmp_path: Path):
    assert len(keys_of(tmp_path / "a.jsonl", DECOMPOSED, COMPOSED, "Jose")) == 2


def test_order_name_and_answers_make_no_other_patients(tmp_path: Path):
    first = keys_of(tmp_path / "a.jsonl", "P1", "P2")
    assert keys_of(tmp_path / "other.jsonl", "P2", "P1", text="no") == first


def test_without_patients_a_record_is_known_by_its_text(tmp_path: Path):
    first, second = (keys_of(tmp_path / f"{text}.jsonl", None, text=text) for text in ("a", "b"))
    assert first != second
    assert first == keys_of(tmp_path / "c.jsonl", None, text="a")
    assert all("q0" not in key for key in first)
