"""Reading files: what is refused and how it is said, privacy, and exact round trips."""

import csv
import io
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets.config
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedpeft.data import FORMAT_NAMES, Record, Turn, read_records
from fedpeft.data.files import FILE_TYPES
from fedpeft.errors import DataError

SHARED = Path(__file__).resolve().parents[2].parent / "shared"
CANARY = "CANARY-7f3a91"

Write = Callable[[str, str | bytes], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        read_records(path, **options)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None, "the context can hold record text"
    message = str(caught.value)
    assert str(path) in message
    assert CANARY not in message
    assert "\n" not in message
    return message


def test_missing_file(tmp_path: Path) -> None:
    assert "there is no such file: check the path" in refusal(tmp_path / "x.csv")


def test_directory(tmp_path: Path) -> None:
    assert "it is a directory: name one file in it" in refusal(tmp_path)


def test_empty_file(write: Write) -> None:
    assert "it is empty" in refusal(write("x.jsonl", ""))


@pytest.mark.parametrize(
    ("name", "content"),
    [("x.csv", "question,answer\n\n,\n"), ("x.json", "[]"), ("x.jsonl", "\n \n")],
)
def test_file_without_rows(write: Write, name: str, content: str) -> None:
    assert "it holds no rows" in refusal(write(name, content))


def test_parquet_without_rows(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), path)
    assert "it holds no rows" in refusal(path)


def test_unknown_extension(write: Write) -> None:
    message = refusal(write("x.xlsx", "a"))
    assert "the extension must be one of .jsonl, .json, .csv, .parquet" in message


def test_special_file(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    os.mkfifo(path)
    assert "it is not a regular file" in refusal(path)


def test_unreadable_file(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write("x.csv", "text\nt\n")

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", denied)  # a mode of 000 does not stop root
    assert "Permission denied: check the file's owner and mode" in refusal(path)


def test_wrong_format_names_the_file(write: Write) -> None:
    path = write("x.csv", "question,answer\nq,a\n")
    assert "the nearest format is 'question-answer'" in refusal(path, format="alpaca")
    assert "there is no format 'qa'" in refusal(path, format="qa")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", "question,answer\nq,a\nq,\xe9\n".encode("latin-1"), "line 3 is not UTF-8 text"),
        ("x.csv", "text\nhello\n".encode("utf-16"), "line 1 is not UTF-8 text"),
        ("x.csv", f"text\n{CANARY}\0b\n", "line 2 is not UTF-8 text: save the file as UTF-8"),
        ("x.csv", f"question;answer\n{CANARY};a\n", "its columns are separated by semicolons"),
        ("x.csv", "question\tanswer\nq\ta\n", "its columns are separated by tabs"),
        ("x.csv", f"text,text\n{CANARY},b\n", "two columns have the same name"),
        ("x.csv", f"{CANARY},{CANARY} 2\na,b\n", "no column has a name that fedpeft knows"),
        ("x.json", f'[{{"text": "a"}},\n{{"text": "{CANARY}]', "but line 2 is not valid JSON"),
        ("x.json", "[" * 100_000, "line 1 is not valid JSON"),
        ("x.json", f'{{"data": "{CANARY}"}}', "no column has a name that fedpeft knows"),
        ("x.parquet", f"PAR1{CANARY}", "it is not a valid Parquet file"),
        ("x.csv", "a," * 3000, "a valid CSV file of at most 2048 columns"),
    ],
)
def test_unusable_file_is_refused_in_one_sentence(
    write: Write, name: str, content: str | bytes, message: str
) -> None:
    path = write(name, content)
    assert message in refusal(path)
    assert message in refusal(path, skip_bad_rows=True)


QA = '{"question": "q", "answer": "a"}\n'
BAD_ROWS = [
    ("x.jsonl", f'{QA}\n{QA}{{"question": "{CANARY}\n', "line 4", "text that is not valid JSON"),
    ("x.jsonl", f'{QA}["{CANARY}"]\n', "line 2", "a value that is not a JSON object"),
    ("x.jsonl", f'{QA}{{"question": "{CANARY}"}}\n', "line 2", "no answer ('answer')"),
    (
        "x.jsonl",
        f'{QA}{{"question": "{CANARY}", "answer": "\\ud800"}}\n',
        "line 2",
        "an answer ('answer') with an invalid Unicode character",
    ),
    (
        "x.json",
        f'[{{"text": "t"}},\n\n{{"text": ["{CANARY}"]}}]',
        "row 2",
        "a text ('text') that is not text",
    ),
    (
        "x.csv",
        f'question,answer\n"two\nlines",a\n\n"{CANARY}\r\nb",\nq,a\n',
        "line 5",
        "an empty answer ('answer')",
    ),
    (
        "x.csv",
        f'question,answer\n"two\nlines",a\nq,{CANARY},b\nq,a\n',
        "line 4",
        "more values than the header has columns",
    ),
    (
        "x.csv",
        f"question,answer\nq,a\nq,{CANARY}{',b' * 100}\nq,a\n",
        "line 3",
        "more values than the header has columns",
    ),
    (
        "x.csv",
        f'question,answer\n"two\nlines",a\nq,"{CANARY}\nq,a\nq,a\n',
        "line 4",
        "a quotation mark that is never closed",
    ),
    (
        "x.csv",
        f"patient_id,text\np1,t\n,{CANARY}\n",
        "line 3",
        "no 'patient_id', which other rows have",
    ),
]


@pytest.mark.parametrize(("name", "content", "place", "reason"), BAD_ROWS)
def test_bad_row_stops_with_its_place(
    write: Write, name: str, content: str, place: str, reason: str
) -> None:
    path = write(name, content)
    assert refusal(path) == (
        f"cannot use {path}: {place} has {reason}: correct it, or leave out such rows with "
        f"skip_bad_rows = true (--skip-bad-rows)"
    )


@pytest.mark.parametrize(("name", "content", "place", "reason"), BAD_ROWS)
def test_bad_row_is_skipped_and_counted_on_request(
    write: Write, name: str, content: str, place: str, reason: str
) -> None:
    records = read_records(write(name, content), skip_bad_rows=True)
    assert records.skipped == {reason: 1}
    assert len(records) >= 1
    assert f"; skipped 1 row (1 with {reason})" in records.describe()
    assert CANARY not in repr(records)
    assert CANARY not in str([record.turns for record in records.records])


def test_bad_parquet_row_is_named_by_number(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"prompt": ["q", "q"], "completion": ["a", None]}), path)
    assert "row 2 has no answer ('completion')" in refusal(path)


def test_first_bad_row_is_the_one_named(write: Write) -> None:
    path = write("x.csv", "patient_id,text\n,t\np,t\np,\n")
    assert "line 2 has no 'patient_id'" in refusal(path)


def test_file_of_bad_rows_only(write: Write) -> None:
    path = write("x.jsonl", "{\n{\n")
    assert "line 1 has text that is not valid JSON" in refusal(path)
    message = refusal(path, skip_bad_rows=True)
    assert "none of its 2 rows can be used (2 with text that is not valid JSON)" in message


@pytest.fixture
def temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bytes]]:
    """Collect what lies in the temporary directory, also just before it is removed."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    seen: list[bytes] = []
    rmtree = shutil.rmtree

    def look_and_remove(path: str, *arguments: Any, **options: Any) -> None:
        assert Path(path).stat().st_mode & 0o777 == 0o700
        files = [item for item in Path(path).rglob("*") if not item.is_symlink()]
        seen.extend(item.read_bytes() for item in files if item.is_file())
        rmtree(path, *arguments, **options)

    monkeypatch.setattr(shutil, "rmtree", look_and_remove)
    yield seen
    assert list(folder.iterdir()) == [], "something stayed behind"


FAILING = {"open quote": f'question,answer\nq,"{CANARY}\n', "bad row": f"text\n{CANARY}\n,\nt,u\n"}


@pytest.mark.parametrize("case", ["jsonl", "json", "csv", "parquet", *FAILING])
def test_no_copy_of_a_record_is_on_disk(
    case: str,
    write: Write,
    tmp_path: Path,
    temporary_files: list[bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    rows = [{"question": CANARY, "answer": CANARY}] * 100
    if case in FAILING:
        refusal(write("x.csv", FAILING[case]))
    else:
        assert len(read_records(write(f"x.{case}", to_file(rows, f".{case}")))) == 100
    assert not any(CANARY.encode() in content for content in temporary_files)
    assert not cache.exists(), "not even lock files belong in the user's cache"


def test_nothing_is_printed_or_logged(write: Write, capfd: pytest.CaptureFixture[str]) -> None:
    logged: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.addFilter(lambda record: bool(logged.append(record)))
    logger = logging.getLogger("datasets")
    logger.addHandler(handler)
    try:
        read_records(write("x.csv", "text\nt\n"))
        refusal(write("y.csv", f'text\n"{CANARY}\n'))
        refusal(write("z.parquet", f"{CANARY}"))
    finally:
        logger.removeHandler(handler)
    assert logged == []
    assert capfd.readouterr() == ("", "")


def test_name_that_looks_like_a_pattern_is_a_name(write: Write) -> None:
    write("a1.csv", "text\nwrong file\n")
    records = read_records(write("a[1].csv", "text\nright file\n"))
    assert [record.text for record in records.records] == ["right file"]


def test_csv_values_stay_text(write: Write) -> None:
    values = ["1234", "yes", "NA", "null", "NaN", "2024-01-02", "1e5", " x ", "True", "007"]
    path = write("x.csv", "\ufeff" + "\r\n".join(["text", *values]) + "\r\n")
    assert [record.text for record in read_records(path).records] == values


def test_json_values_stay_text(write: Write) -> None:
    values = ["1234", "2024-01-02", "2024-01-02T10:00:00Z", "null"]
    lines = [json.dumps({"text": value}) for value in values]
    for name, content in (("x.jsonl", "\n".join(lines)), ("x.json", f"[{','.join(lines)}]")):
        records = read_records(write(name, "\ufeff" + content)).records
        assert [record.text for record in records] == values


def test_json_file_may_hold_lines(write: Write) -> None:
    records = read_records(write("x.json", f"\n{QA}{QA}"))
    assert [record.row for record in records.records] == [2, 3]
    assert records.unit == "line"


def test_description_names_format_and_patients(write: Write) -> None:
    path = write("x.csv", "patient_id,text,label\n1,a,\n1,b,l\n2,c,l\n")
    records = read_records(path)
    assert records.describe() == f"{path.parent.name}/x.csv: 3 rows, plain text, 2 patients"
    assert [record.label for record in records.records] == [None, "l", "l"]
    assert records.place(3) == f"{path} line 3"


CLINICS = {
    "cancer-gov": (620, 38, "alpaca"),
    "gard": (4635, 197, "messages"),
    "ghr": (4710, 245, "prompt-completion"),
    "mplus-topics": (833, 40, "question-answer"),
    "niddk": (1011, 90, "alpaca"),
    "ninds": (930, 58, "sharegpt"),
    "senior-health": (629, 14, "question-answer"),
    "cdc": (225, 16, "text"),
    "pubmedqa": (845, 57, "alpaca"),
    "mts-dialog": (1443, 76, "question-answer"),
}


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"the real clinics are not at {SHARED}")
@pytest.mark.parametrize("clinic", CLINICS)
def test_real_clinic_loads_unchanged(clinic: str) -> None:
    train, valid, name = CLINICS[clinic]
    for split, rows in (("train", train), ("valid", valid)):
        (path,) = (SHARED / "data" / "clinics" / clinic).glob(f"{split}.*")
        records = read_records(path)
        assert (len(records), records.format, records.skipped) == (rows, name, {})
        assert records.patients is not None


TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0")).filter(str.strip)


def to_file(rows: list[dict[str, Any]], suffix: str) -> bytes:
    if suffix == ".jsonl":
        return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()
    if suffix == ".json":
        return json.dumps(rows, indent=1).encode()
    if suffix == ".parquet":
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), buffer)
        return buffer.getvalue()
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0].keys())
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def to_row(name: str, question: str, answer: str) -> dict[str, Any]:
    if name == "messages":
        turns = [("user", question), ("assistant", answer)]
        return {"messages": [{"role": role, "content": text} for role, text in turns]}
    if name == "sharegpt":
        turns = [("human", question), ("gpt", answer)]
        return {"conversations": [{"from": role, "value": text} for role, text in turns]}
    columns = {
        "alpaca": ("instruction", "output"),
        "prompt-completion": ("prompt", "completion"),
        "question-answer": ("question", "answer"),
        "text": ("text",),
    }
    return dict(zip(columns[name], (question, answer), strict=False))


@pytest.mark.parametrize("suffix", FILE_TYPES)
@pytest.mark.parametrize("name", FORMAT_NAMES)
@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(pairs=st.lists(st.tuples(TEXTS, TEXTS, TEXTS), min_size=1, max_size=4))
def test_any_text_survives_every_format_and_file_type(
    pairs: list[tuple[str, str, str]], name: str, suffix: str, tmp_path: Path
) -> None:
    if suffix == ".csv" and name in ("messages", "sharegpt"):
        return  # a CSV cannot hold a list of turns
    rows = [to_row(name, question, answer) | {"patient_id": who} for question, answer, who in pairs]
    path = tmp_path / f"x{suffix}"
    path.write_bytes(to_file(rows, suffix))
    got = read_records(path)
    assert got.format == name
    places = [record.row for record in got.records]
    assert got.records == tuple(
        Record((), place, who, None, question)
        if name == "text"
        else Record((Turn("user", question), Turn("assistant", answer)), place, who, None)
        for place, (question, answer, who) in zip(places, pairs, strict=True)
    )
    assert got.patients == len({who for _, _, who in pairs})
