"""docs/spec/audit-log.md against the code: its tables, and its vector read by another reader."""

import hashlib
import json
import re
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fedpeft.audit_log import FIELDS, AuditLog
from fedpeft.sealing import Identity

TEXT = (Path(__file__).parents[2] / "docs" / "spec" / "audit-log.md").read_text("utf-8")
LINES, HASHED = re.findall(r"^```json\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)
KEEPER = Identity(bytes(range(128)))


def test_the_documented_kinds_and_fields_are_those_of_the_code():
    rows = re.findall(r"^\| `([a-z-]+)` \| ((?:`[a-z0-9_]+` ?)+)\|", TEXT, flags=re.MULTILINE)
    found = {kind: frozenset(re.findall(r"`([a-z0-9_]+)`", names)) for kind, names in rows}
    assert found == FIELDS


def test_the_documented_lines_are_what_the_code_writes(tmp_path: Path):
    entries = [json.loads(line) for line in LINES.splitlines()]
    times = iter([entry["time"] for entry in entries])
    log = AuditLog(tmp_path / "audit", signer=KEEPER, clock=lambda: next(times))
    for entry in entries[:-1]:
        log.append(entry["kind"], entry["about"])
    log.checkpoint()
    assert (tmp_path / "audit" / "000001.jsonl").read_text() == LINES
    end = (tmp_path / "audit" / "end").read_bytes()
    assert len(end) == 160
    assert json.loads(end) == {"schema": 1, "seq": 4, "hash": entries[-1]["hash"]}


def test_a_reader_made_from_the_document_alone_finds_the_vector_whole():
    previous = "0" * 64
    for number, line in enumerate(LINES.splitlines(), start=1):
        entry = json.loads(line)
        digest = entry.pop("hash")
        plain = json.dumps(entry, sort_keys=True, separators=(",", ":"))
        assert hashlib.sha256(b"fedpeft-audit-1\n" + plain.encode()).hexdigest() == digest
        assert (entry["seq"], entry["previous"], entry["v"]) == (number, previous, 1)
        if number == 3:
            assert plain == HASHED.rstrip("\n")
        if entry["kind"] == "checkpoint":
            signed = b"fedpeft audit checkpoint, version 1\x00" + (number - 1).to_bytes(8, "little")
            key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(entry["about"]["key"]))
            key.verify(bytes.fromhex(entry["about"]["signature"]), signed + bytes.fromhex(previous))
        previous = digest
