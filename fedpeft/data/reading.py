"""Read a clinic's file of private records: the way in for every other package.

Must not know file types (:mod:`fedpeft.data.files`) or layouts
(:mod:`fedpeft.data.formats`): it joins the two, and decides what a bad row means.
"""

from collections import Counter
from itertools import islice
from pathlib import Path
from typing import NoReturn

from fedpeft.data.files import RawFile, RawRow, read_rows
from fedpeft.data.formats import BadRow, Format, choose_format, detect_format, to_record
from fedpeft.data.records import Record, RecordSet, count, reasons
from fedpeft.errors import DataError

_ROWS_TO_DETECT_FROM = 10


def read_records(
    path: Path, *, format: str | None = None, skip_bad_rows: bool = False
) -> RecordSet:
    """Read all records of a JSONL, JSON, CSV or Parquet file into memory.

    No part of the file is copied to disk, sent over a network, logged, or put
    into an error message.

    Args:
        path: the file; its extension says which type it is. A ``.json`` file may
            be one array or one object a line.
        format: a name of :data:`fedpeft.data.FORMAT_NAMES`, or None to detect it
            from the column names.
        skip_bad_rows: leave out rows that cannot be used and count them in
            ``RecordSet.skipped``, instead of stopping at the first.

    Returns:
        At least one record, in file order.

    Raises:
        DataError: the file cannot be read, fits no format, holds no usable row,
            or has a bad row and ``skip_bad_rows`` is false.
    """
    path = Path(path)
    raw = read_rows(path)
    if not raw.rows:
        raise DataError(f"cannot use {path}: it holds no rows: export the records again")
    columns = _columns(raw.rows)
    if columns is None:
        _refuse_bad_rows(path, raw, _faults(raw.rows), skip_bad_rows)
    layout = _layout(path, format, columns)
    records, faults = _to_records(raw.rows, layout)
    records, without_patient = _split_off_patientless(records)
    faults += without_patient
    if faults and not (skip_bad_rows and records):
        _refuse_bad_rows(path, raw, faults, skip_bad_rows)
    patients = {record.patient_id for record in records if record.patient_id is not None}
    return RecordSet(
        records=tuple(records),
        format=layout.name,
        file=path,
        skipped=dict(Counter(fault.reason for _, fault in faults)),
        patients=len(patients) or None,
        unit=raw.unit,
        layout=layout.title,
    )


def _columns(rows: list[RawRow]) -> set[str] | None:
    """Return the column names of the first rows, or None if no row could be decoded."""
    decoded = (row for _, row in rows if not isinstance(row, BadRow))
    sample = list(islice(decoded, _ROWS_TO_DETECT_FROM))
    return {name for row in sample for name in row} if sample else None


def _faults(rows: list[RawRow]) -> list[tuple[int, BadRow]]:
    return [(place, row) for place, row in rows if isinstance(row, BadRow)]


def _layout(path: Path, name: str | None, columns: set[str]) -> Format:
    try:
        return detect_format(columns) if name is None else choose_format(name, columns)
    except DataError as error:
        fault = str(error)
    raise DataError(f"cannot use {path}: {fault}")


def _to_records(
    rows: list[RawRow], layout: Format
) -> tuple[list[Record], list[tuple[int, BadRow]]]:
    records: list[Record] = []
    faults: list[tuple[int, BadRow]] = []
    for place, row in rows:
        try:
            if isinstance(row, BadRow):
                faults.append((place, row))
            else:
                records.append(to_record(row, layout, place))
        except BadRow as fault:
            # Its traceback would keep the frames, and so the text, of every bad row.
            faults.append((place, fault.with_traceback(None)))
    return records, faults


def _split_off_patientless(
    records: list[Record],
) -> tuple[list[Record], list[tuple[int, BadRow]]]:
    """A row without a patient would escape any protection that counts by patient."""
    kept = [record for record in records if record.patient_id is not None]
    if not kept:
        return records, []
    fault = BadRow("no 'patient_id', which other rows have")
    return kept, [(record.row, fault) for record in records if record.patient_id is None]


def _refuse_bad_rows(
    path: Path, raw: RawFile, faults: list[tuple[int, BadRow]], skip_bad_rows: bool
) -> NoReturn:
    if skip_bad_rows:
        why = reasons(Counter(fault.reason for _, fault in faults))
        raise DataError(
            f"cannot use {path}: none of its {count(len(raw.rows), 'row')} can be used "
            f"({why}): export the records again"
        )
    place, fault = min(faults, key=lambda item: item[0])
    raise DataError(
        f"cannot use {path}: {raw.unit} {place} has {fault.reason}: correct it, or leave out "
        f"such rows with skip_bad_rows = true (--skip-bad-rows)"
    )
