"""The specification of the privacy ledger says what the code does: its test vector is read."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from fedpeft.privacy.data_identity import units_digest
from fedpeft.privacy.ledger_chain import START, Entry, entry_hash

PAGE = Path(__file__).resolve().parents[2] / "docs" / "spec" / "privacy-ledger.md"
ROW = re.compile(r"^\| (\d) \| (.+) \| ([0-9a-f]{64}) \|$", re.MULTILINE)


def documented() -> list[tuple[Entry, str]]:
    """Return the rows of the page and their hashes."""
    rows: list[tuple[Entry, str]] = []
    for _, text, digest in ROW.findall(PAGE.read_text("utf-8")):
        fields: dict[str, Any] = {}
        for name, value in re.findall(r"`(\w+)` ([^,]+)", text):
            kind = type(Entry._field_defaults.get(name, ""))
            fields[name] = kind(value)
        rows.append((Entry(**fields), digest))
    return rows


def test_the_documented_rows_have_the_documented_hashes():
    previous, rows = START.hash, documented()
    assert len(rows) == 3
    for entry, digest in rows:
        assert entry_hash(previous, entry) == digest
        previous = digest


def test_the_documented_digests_are_those_of_key_and_units():
    (key, _), (data, _), _ = documented()
    assert key.digest == hashlib.sha256(bytes(32)).hexdigest()
    assert data.digest == units_digest([bytes([1]) * 16, bytes([2]) * 16])


def test_the_documented_line_and_anchor_belong_to_the_last_row():
    text, (_, last) = PAGE.read_text("utf-8"), documented()[-1]
    (line,) = re.findall(r"^    (16:fedpeft-ledger-1,.*)$", text, re.MULTILINE)
    assert hashlib.sha256(line.encode()).hexdigest() == last
    (anchor,) = re.findall(r'^    (\{"schema": 1, "seq".*)$', text, re.MULTILINE)
    assert json.loads(anchor) == {"schema": 1, "seq": 3, "hash": last}
