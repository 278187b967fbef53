"""What the people in a set of records are known by, to tell one data set from another."""

import hashlib
import unicodedata

from fedpeft.data.records import Record, RecordSet


def person(patient_id: str) -> str:
    """Return one spelling for a patient id: spaces around it and encodings of accents dropped.

    One patient written in two ways would be protected as two.
    """
    return unicodedata.normalize("NFC", patient_id.strip())


def unit_keys(records: RecordSet) -> tuple[str, ...]:
    """Return the distinct patient ids, or digests of the records where there are none.

    Independent of file names, order, tokenizer and truncation. The keys are as private
    as the records: they stay on the box, and are kept under a keyed hash only.
    """
    if records.patients is not None:
        keys = {f"patient {person(record.patient_id or '')}" for record in records.records}
    else:
        keys = {f"record {_digest(record)}" for record in records.records}
    return tuple(sorted(keys))


def _digest(record: Record) -> str:
    digest = hashlib.sha256()
    parts = [record.text or ""]
    for turn in record.turns:
        parts += [turn.role, turn.text]
    for part in parts:
        content = part.encode()
        digest.update(len(content).to_bytes(8))
        digest.update(content)
    return digest.hexdigest()
