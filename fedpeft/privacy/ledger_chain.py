"""The hash chain of the privacy ledger, format 1, and the anchor of its end.

Every row of the table ``entries`` holds the hash of the row before it and its own:

    hash = SHA-256(netstring("fedpeft-ledger-1") || netstring(previous)
                   || netstring(field 1) || ... || netstring(field 16))

in lower-case hexadecimal. ``previous`` is the hash of the row before as 64 hexadecimal
digits, 64 zeros for row 1. The fields are those of ``Entry``, in that order; text is
taken as UTF-8, a whole number as decimal digits, a float as Python's ``float.hex()``,
which is exact. ``netstring(text)`` is the number of bytes in decimal, a colon, the
bytes and a comma (Bernstein 1997), so that no two lists of fields read the same. The
number of a row is not hashed: its place is fixed by ``previous``.

The anchor is a file beside the ledger, ``<ledger>.head``: one JSON object with ``schema``
1, ``seq`` and ``hash`` of the last row. It is written after each commit, so a crash
leaves it behind the table, which is fine, and never ahead of it: that means that rows
were taken off the end.

What this cannot find: somebody who may write both files and computes the whole chain
anew, or who puts back an older copy of both. Against that only a copy of the anchor kept
elsewhere helps (``fedpeft-client ledger verify`` prints it).

Must not know SQLite.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final, Literal, NamedTuple

from fedpeft.errors import LedgerDamaged
from fedpeft.storage import explained, write_atomically

SCHEMA: Final = 1
_FORMAT: Final = "fedpeft-ledger-1"
_ANCHOR_BYTES: Final = 160

EntryKind = Literal["key", "data", "merge", "charge"]


class Entry(NamedTuple):
    """What one row says; fields that its kind does not use are 0 or empty.

    ``key``, row 1: ``digest`` is the SHA-256 of the key of the data identity. ``data``:
    ``units`` more units belong to ``dataset``; ``digest`` is the SHA-256 of their keyed
    hashes, sorted and joined. ``merge``: data set ``other`` is part of ``dataset`` from
    now on. ``charge``: one step of ``run`` is charged to ``dataset``; ``digest`` is the attempt
    that it belongs to, or empty. ``time`` informs people, and nothing depends on it.
    """

    kind: EntryKind
    time: str
    dataset: int = 0
    other: int = 0
    units: int = 0
    digest: str = ""
    federation: str = ""
    run: str = ""
    round: int = 0
    step: int = 0
    unit: str = ""
    noise: str = ""
    sampling_rate: float = 0.0
    noise_multiplier: float = 0.0
    l2: float = 0.0
    l1: float = 0.0


class Anchor(NamedTuple):
    """The end of a chain: the number and hash of its last row."""

    seq: int
    hash: str


class Row(NamedTuple):
    """A row as it stands in the table."""

    seq: int
    previous: str
    hash: str
    entry: Entry


START: Final = Anchor(0, "0" * 64)


def entry_hash(previous: str, entry: Entry) -> str:
    """Return the hash of a row that says ``entry`` and follows the row hashed ``previous``."""
    texts = (_FORMAT, previous, *(_text(field) for field in entry))
    return hashlib.sha256(b"".join(map(_netstring, texts))).hexdigest()


def chain_problems(
    rows: Iterable[Row], anchor: Anchor | None, last: Anchor = START
) -> Iterator[str]:
    """Yield a sentence for each break in the chain, in order.

    Args:
        rows: by ascending number, those after ``last``.
        anchor: from the file beside the ledger; None if there is none.
        last: the row up to which the chain is known to be whole.
    """
    # Of two processes the slower may leave the anchor at the earlier row.
    anchored = anchor is not None and (anchor.seq < last.seq or anchor == last)
    for row in rows:
        yield from _row_problems(last, row)
        last = Anchor(row.seq, row.hash)
        anchored = anchored or last == anchor
    if anchor is None:
        yield "the anchor file is missing, so rows may be missing at the end"
    elif anchor.seq > last.seq:
        yield (
            f"the last rows are missing: the table ends with row {last.seq}, "
            f"the anchor file with row {anchor.seq}"
        )
    elif not anchored:
        yield f"row {anchor.seq} is not the one that the anchor file names"


def _row_problems(last: Anchor, row: Row) -> Iterator[str]:
    gap = row.seq - last.seq - 1
    if gap == 1:
        yield f"a row is missing after row {last.seq}"
    elif gap > 1:
        yield f"{gap} rows are missing after row {last.seq}"
    elif row.previous != last.hash:
        yield f"row {row.seq} does not follow row {last.seq}: rows were reordered or replaced"
    try:
        unchanged = entry_hash(row.previous, row.entry) == row.hash
    except (AttributeError, UnicodeEncodeError):
        unchanged = False
    if not unchanged:
        yield f"row {row.seq} was changed"


def _text(field: str | float) -> str:
    return field.hex() if isinstance(field, float) else str(field)


def _netstring(text: str) -> bytes:
    data = text.encode()
    return b"%d:%b," % (len(data), data)


def anchor_path(ledger: Path) -> Path:
    """Return where the anchor of a ledger is kept."""
    return ledger.with_name(ledger.name + ".head")


def write_anchor(path: Path, anchor: Anchor) -> None:
    """Write the anchor file, readable for its owner only.

    It is not synced, as each step would wait for that: after a power cut it may stand
    behind the ledger, as after a kill. Every anchor has the same length and is written in
    place, so that it is never cut short.

    Raises:
        StorageError: it cannot be written.
    """
    content = json.dumps({"schema": SCHEMA, "seq": anchor.seq, "hash": anchor.hash})
    data = content.ljust(_ANCHOR_BYTES - 1).encode() + b"\n"
    if not path.exists():
        write_atomically(path, data, mode=0o600)
        return
    with explained("write", path), path.open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        os.pwrite(file.fileno(), data, 0)


def read_anchor(path: Path) -> Anchor | None:
    """Return what the anchor file holds; None if there is no such file.

    Raises:
        StorageError: it cannot be read.
        LedgerDamaged: it is not an anchor file.
    """
    with explained("read", path):
        try:
            with path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH)
                content = file.read()
        except FileNotFoundError:
            return None
    try:
        match json.loads(content):
            case {"schema": 1, "seq": int(seq), "hash": str(digest)} if seq > 0:
                return Anchor(seq, digest)
            case _:
                raise ValueError
    except ValueError:
        raise LedgerDamaged(
            f"{path} does not hold the end of a ledger, so rows may be missing unseen: restore it "
            "and the ledger from one backup that was made after the last round"
        ) from None
