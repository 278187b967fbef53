"""Turn a data file of any accepted type into raw rows, through the datasets library.

Must not know record layouts. Guards the promise that records stay in memory:

* datasets normally writes an Arrow copy of what it reads to a cache that outlives
  the process. Here it streams, which writes none, and its cache folder (for lock
  files) is private, mode 700, and removed in all cases.
* Errors of datasets, pandas and pyarrow can quote the data, and datasets logs them.
  None of them gets out of this file, not even as the context of another error.

JSON does not go through the JSON reader of datasets, which guesses types (a text
that looks like a date becomes a timestamp) and knows no line numbers; its text
reader hands over lines or the whole document, which json then decodes exactly.
"""

import importlib
import json
import logging
import re
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

from fedpeft.data.formats import BadRow, Row
from fedpeft.data.records import Unit
from fedpeft.errors import DataError

FILE_TYPES = (".jsonl", ".json", ".csv", ".parquet")

RawRow: TypeAlias = tuple[int, Row | BadRow]
"""Where the row stands, from 1, and the row; or why it cannot be decoded."""

_BOM = "utf-8-sig"
_FIRST_CSV_WIDTH = 32
_WIDEST_CSV = 2048


@dataclass(frozen=True, slots=True, repr=False)
class RawFile:
    """All rows of a file in order, and what their places count."""

    rows: list[RawRow]
    unit: Unit


class _ReadFailed(Exception):
    """The library gave up; holds only numbers, never the library's own words."""

    def __init__(self, fields_seen: int | None, open_quote_at: int | None) -> None:
        super().__init__()
        self.fields_seen = fields_seen
        self.open_quote_at = open_quote_at


def read_rows(path: Path) -> RawFile:
    """Read the whole of ``path`` into memory; nothing of it is written anywhere.

    Raises:
        DataError: the file is missing, unreadable, empty, of an unknown type, or
            not what its extension says.
    """
    suffix = path.suffix.lower()
    _check_is_readable_file(path)
    if suffix not in FILE_TYPES:
        raise DataError(
            f"cannot read {path}: the extension must be one of {', '.join(FILE_TYPES)}: "
            f"export the records as one of these"
        )
    if suffix == ".parquet":
        return RawFile(_parquet_rows(path), "row")
    _check_text(path)
    if suffix == ".csv":
        return RawFile(_csv_rows(path), "line")
    if suffix == ".json" and _first_character(path) == "[":
        return RawFile(_json_array_rows(path), "row")
    return RawFile(_json_line_rows(path), "line")


def _check_is_readable_file(path: Path) -> None:
    fault = None
    try:
        if path.is_dir():
            fault = "it is a directory: name one file in it"
        elif not path.exists():
            fault = "there is no such file: check the path"
        elif not path.is_file():
            fault = "it is not a regular file: name a file on disk"
        else:
            with path.open("rb") as file:
                if not file.read(1):
                    fault = "it is empty: export the records again"
    except OSError as error:
        # The reason of the operating system ("Permission denied") holds no data.
        fault = f"{error.strerror or 'input/output error'}: check the file's owner and mode"
    if fault:
        raise DataError(f"cannot read {path}: {fault}")


def _check_text(path: Path) -> None:
    """Refuse what is not UTF-8 text, by line, before a library trips over it.

    pandas ends a value at a NUL byte without a word, so those are refused too.
    """
    with path.open("rb") as file:
        lines = enumerate(file, start=1)
        bad = next((number for number, line in lines if b"\0" in line or not _is_utf8(line)), None)
    if bad is not None:
        raise DataError(f"cannot read {path}: line {bad} is not UTF-8 text: save the file as UTF-8")


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


def _first_character(path: Path) -> str:
    with path.open(encoding=_BOM) as file:
        for line in file:
            if line.strip():
                return line.strip()[0]
    return ""


@contextmanager
def _silenced(datasets: Any) -> Generator[None, None, None]:
    """Stop datasets from logging: it logs the errors of its parsers in full."""
    log = datasets.utils.logging
    before = log.get_verbosity()
    log.set_verbosity(logging.CRITICAL + 1)
    try:
        yield
    finally:
        log.set_verbosity(before)


def _stream(
    kind: Literal["text", "csv", "parquet"], path: Path, **options: object
) -> list[Mapping[str, object]]:
    """Read ``path`` with a reader of datasets; the one place that touches its API.

    Raises:
        _ReadFailed: for whatever reason; deliberately without a cause or context.
    """
    # Imported here because it takes a second, which other commands need not spend,
    # and by name because it is untyped.
    datasets: Any = importlib.import_module("datasets")
    if "columns" in options:
        names = cast("list[str]", options.pop("columns"))
        text = datasets.Value("string")
        options |= {"names": names, "features": datasets.Features(dict.fromkeys(names, text))}
    words = ""
    try:
        with tempfile.TemporaryDirectory(prefix="fedpeft-") as folder, _silenced(datasets):
            # datasets takes a path for a glob pattern: "a[1].csv" would match
            # nothing, or another file. A link with a plain name stands in for it.
            link = Path(folder) / f"records.{kind}"
            link.symlink_to(path.resolve())
            reader = getattr(datasets.IterableDataset, f"from_{kind}")
            rows: list[Mapping[str, object]] = list(reader(str(link), cache_dir=folder, **options))
            return rows
    except Exception as error:
        words = str(error)
    seen = re.search(r"\bsaw (\d+)\b", words)
    quote = re.search(r"EOF inside string starting at row (\d+)", words)
    raise _ReadFailed(int(seen[1]) if seen else None, int(quote[1]) if quote else None)


def _stream_or_refuse(
    kind: Literal["text", "csv", "parquet"], path: Path, type_name: str, **options: object
) -> list[Mapping[str, object]]:
    try:
        return _stream(kind, path, **options)
    except _ReadFailed:
        pass
    raise DataError(
        f"cannot read {path}: it is not a valid {type_name} file: export the records again"
    )


def _parquet_rows(path: Path) -> list[RawRow]:
    # Without a batch size, datasets fails on a file that has no rows.
    rows = _stream_or_refuse("parquet", path, "Parquet", batch_size=1024)
    return list(enumerate(rows, start=1))


def _decode(source: str) -> tuple[object, int | None]:
    """Return what ``source`` spells in JSON, or the line in it where it is wrong."""
    try:
        return json.loads(source), None
    except json.JSONDecodeError as error:
        return None, error.lineno
    except (ValueError, RecursionError):  # a number of thousands of digits, or of brackets
        return None, 1


def _object_or_fault(value: object) -> Row | BadRow:
    if isinstance(value, dict):
        return cast("Row", value)
    return BadRow("a value that is not a JSON object")


def _line_or_fault(source: str) -> Row | BadRow:
    value, bad_line = _decode(source)
    if bad_line is not None:
        return BadRow("text that is not valid JSON")
    return _object_or_fault(value)


def _json_line_rows(path: Path) -> list[RawRow]:
    lines = _stream_or_refuse("text", path, "text", encoding=_BOM)
    texts = (cast("str", line["text"]) for line in lines)
    return [
        (number, _line_or_fault(text)) for number, text in enumerate(texts, start=1) if text.strip()
    ]


def _json_array_rows(path: Path) -> list[RawRow]:
    documents = _stream_or_refuse("text", path, "text", encoding=_BOM, sample_by="document")
    value, bad_line = _decode(cast("str", documents[0]["text"]))
    if bad_line is not None:
        raise DataError(
            f"cannot read {path}: it begins as a JSON array, but line {bad_line} is not valid "
            f"JSON: correct it or export the records again"
        )
    items = cast("list[object]", value)
    return [(number, _object_or_fault(item)) for number, item in enumerate(items, start=1)]


def _csv_rows(path: Path) -> list[RawRow]:
    """Read every value as text, and count lines as an editor does."""
    table, open_quote = _csv_table(path)
    rows: list[RawRow] = []
    header: list[str] | None = None
    line = 1
    for cells in table:
        used = len(cells)
        while used and not cells[used - 1]:
            used -= 1
        # A line without any value is a blank line, or one of the rows of commas
        # that spreadsheets leave at the end: no record is lost with it.
        if header is None and used:
            header = _checked_header(path, cells[:used])
        elif header is not None and used > len(header):
            rows.append((line, BadRow("more values than the header has columns")))
        elif header is not None and used:
            rows.append((line, dict(zip(header, cells, strict=False))))
        line += 1 + sum(_line_breaks(cell) for cell in cells[:used])
    if open_quote:
        rows.append((line, BadRow("a quotation mark that is never closed")))
    return rows


def _line_breaks(cell: str) -> int:
    return cell.count("\n") + cell.count("\r") - cell.count("\r\n")


def _checked_header(path: Path, names: list[str]) -> list[str]:
    named = [name for name in names if name]
    if len(set(named)) < len(named):
        raise DataError(f"cannot read {path}: two columns have the same name: rename one of them")
    for separator, word in ((";", "semicolons"), ("\t", "tabs")):
        if len(names) == 1 and separator in names[0]:
            raise DataError(
                f"cannot read {path}: its columns are separated by {word}: export it with commas"
            )
    return names


def _csv_table(path: Path) -> tuple[list[list[str]], bool]:
    """Return all rows with the header as the first, and whether a quote stays open.

    The header is not given to pandas, because with one it takes surplus values
    for row names, or refuses the file. Instead the table is made wide enough.
    After an open quote the rest of the file is one value: the rows before it are
    returned.
    """
    width = _FIRST_CSV_WIDTH
    rows_before_quote: int | None = None
    while True:
        try:
            table = _stream_csv(path, width, rows_before_quote)
        except _ReadFailed as failed:
            if failed.fields_seen and width < failed.fields_seen <= _WIDEST_CSV:
                width = min(max(failed.fields_seen, 2 * width), _WIDEST_CSV)
                continue
            if failed.open_quote_at is not None and rows_before_quote is None:
                rows_before_quote = failed.open_quote_at
                continue
        else:
            return table, rows_before_quote is not None
        break
    raise DataError(
        f"cannot read {path}: it is not a valid CSV file of at most {_WIDEST_CSV} columns: "
        f"export the records again"
    )


def _stream_csv(path: Path, width: int, row_limit: int | None) -> list[list[str]]:
    rows = _stream(
        "csv",
        path,
        columns=[str(index) for index in range(width)],
        header=None,
        nrows=row_limit,
        encoding=_BOM,
        # So that "NA", "null" and an empty answer stay text.
        keep_default_na=False,
        na_filter=False,
        # So that lines can be counted.
        skip_blank_lines=False,
        index_col=False,
    )
    return [cast("list[str]", list(row.values())) for row in rows]
