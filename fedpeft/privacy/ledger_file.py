"""The SQLite file of the privacy ledger: opened, read and appended to, nothing else.

One plain file with mode 600 and a rollback journal, which any number of processes may
use at once. A commit is on the disk when ``transaction`` returns (``synchronous = EXTRA``
syncs the folder too, without which a power cut could undo it); the anchor follows it.
Must not know what a charge means.
"""

import hashlib
import os
import secrets
import sqlite3
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from fedpeft.errors import FedpeftError, LedgerDamaged, StorageError
from fedpeft.privacy.ledger_chain import (
    SCHEMA,
    START,
    Anchor,
    Entry,
    Row,
    anchor_path,
    entry_hash,
    read_anchor,
    write_anchor,
)

KEY_BYTES: Final = 32
TABLES: Final = (
    """CREATE TABLE entries (
    seq INTEGER PRIMARY KEY,
    kind TEXT NOT NULL,
    time TEXT NOT NULL,
    dataset INTEGER NOT NULL,
    other INTEGER NOT NULL,
    units INTEGER NOT NULL,
    digest TEXT NOT NULL,
    federation TEXT NOT NULL,
    run TEXT NOT NULL,
    round INTEGER NOT NULL,
    step INTEGER NOT NULL,
    unit TEXT NOT NULL,
    noise TEXT NOT NULL,
    sampling_rate REAL NOT NULL,
    noise_multiplier REAL NOT NULL,
    l2 REAL NOT NULL,
    l1 REAL NOT NULL,
    previous TEXT NOT NULL,
    hash TEXT NOT NULL
) STRICT""",
    "CREATE INDEX entries_kind ON entries (kind, dataset)",
    """CREATE TABLE units (
    hash BLOB PRIMARY KEY,
    entry INTEGER NOT NULL
) STRICT, WITHOUT ROWID""",
    "CREATE TABLE secret (key BLOB NOT NULL) STRICT",
    # Also against INSERT OR REPLACE, which fires no trigger of the row that it deletes.
    """CREATE TRIGGER entries_insert BEFORE INSERT ON entries
WHEN NEW.seq IS NOT (SELECT coalesce(max(seq), 0) + 1 FROM entries)
BEGIN SELECT RAISE(ABORT, 'rows are appended, in order'); END""",
    *(
        f"""CREATE TRIGGER {table}_{change.lower()} BEFORE {change} ON {table}
BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END"""
        for table in ("entries", "units", "secret")
        for change in ("UPDATE", "DELETE")
    ),
)
_FIELDS: Final = ", ".join(Entry._fields)
_INSERT: Final = (
    f"INSERT INTO entries (seq, previous, hash, {_FIELDS}) "  # noqa: S608 - names of columns
    f"VALUES (?, ?, ?{', ?' * len(Entry._fields)})"
)
_SELECT: Final = f"SELECT seq, previous, hash, {_FIELDS} FROM entries WHERE seq > ? ORDER BY seq"  # noqa: S608
_DAMAGED: Final = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_SCHEMA}
START_ANEW: Final = (
    "restore both from one backup that was made after the last round, or let those who answer for "
    "the data decide to move both away and forget what was spent"
)


class LedgerFile:
    """An open ledger file; it may be shared by threads."""

    def __init__(self, path: Path, *, timeout_s: float) -> None:
        """Open the file, or make it where there is neither a ledger nor an anchor.

        Raises:
            StorageError: it cannot be opened or made, or a newer fedpeft wrote it.
            LedgerDamaged: it is no ledger, or it is gone and its anchor is not.
        """
        self.path = path
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._appended: Anchor | None = None
        if not path.exists():
            # Before a file is made in its place, which would look like evidence.
            self._require_no_anchor()
        try:
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        except OSError as error:
            raise StorageError(
                f"the privacy ledger {path} cannot be opened ({error.strerror}): check that its "
                "folder exists and may be written"
            ) from error
        self._database = sqlite3.connect(
            path, timeout=timeout_s, isolation_level=None, check_same_thread=False
        )
        try:
            self._set_durable()
            with self.transaction("IMMEDIATE") as database:
                self._prepare(database)
        except BaseException:
            self._database.close()
            raise

    def _set_durable(self) -> None:
        try:
            self._database.execute("PRAGMA synchronous = EXTRA")
        except sqlite3.Error as error:
            raise self._explained(error) from error

    def _prepare(self, database: sqlite3.Connection) -> None:
        (version,) = database.execute("PRAGMA user_version").fetchone()
        if version == 0:
            self._create(database)
        elif version != SCHEMA:
            raise StorageError(
                f"the privacy ledger {self.path} has schema {version}, but this fedpeft knows "
                f"{SCHEMA} only: use the fedpeft version that wrote it"
            )
        elif (end := last_row(database)).seq == 1 and read_anchor(self.anchor_path) is None:
            # Killed between the first commit and the first anchor; only then may it be missing.
            self._appended = end

    def _create(self, database: sqlite3.Connection) -> None:
        self._require_no_anchor()
        for statement in TABLES:
            database.execute(statement)
        key = secrets.token_bytes(KEY_BYTES)
        database.execute("INSERT INTO secret (key) VALUES (?)", (key,))
        self.append(Entry("key", now(), digest=hashlib.sha256(key).hexdigest()))
        database.execute(f"PRAGMA user_version = {SCHEMA}")

    def _require_no_anchor(self) -> None:
        if read_anchor(self.anchor_path) is not None:
            raise LedgerDamaged(
                f"the privacy ledger {self.path} is gone or empty, but {self.anchor_path} shows "
                f"that there was one, so what was spent is unknown: {START_ANEW}"
            )

    @property
    def anchor_path(self) -> Path:
        """Where the anchor is kept."""
        return anchor_path(self.path)

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    @contextmanager
    def transaction(self, mode: str = "DEFERRED") -> Generator[sqlite3.Connection]:
        """Commit what the body did as one, then the anchor; or nothing, if the body raises.

        ``IMMEDIATE`` keeps other writers out from the start, as every body that appends needs.

        Raises:
            StorageError: the disk is full or failing, or the file is locked or read-only.
            LedgerDamaged: the file is no SQLite file any more.
        """
        with self._lock:
            self._appended = None
            try:
                self._database.execute(f"BEGIN {mode}")
                try:
                    yield self._database
                    self._database.execute("COMMIT")
                except BaseException:
                    # A full disk has rolled back already.
                    if self._database.in_transaction:
                        self._database.execute("ROLLBACK")
                    raise
            except sqlite3.Error as error:
                raise self._explained(error) from error
            if self._appended is not None:
                write_anchor(self.anchor_path, self._appended)

    def append(self, entry: Entry) -> int:
        """Add a row within a transaction and return its number."""
        last = last_row(self._database)
        seq, digest = last.seq + 1, entry_hash(last.hash, entry)
        self._database.execute(_INSERT, (seq, last.hash, digest, *entry))
        self._appended = Anchor(seq, digest)
        return seq

    def _explained(self, error: sqlite3.Error) -> FedpeftError:
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
        if code == sqlite3.SQLITE_BUSY:
            return StorageError(
                f"the privacy ledger {self.path} was locked by another program for "
                f"{self._timeout_s:g} seconds, so nothing was run: end that program or wait for it"
            )
        if code in _DAMAGED:
            return LedgerDamaged(
                f"the privacy ledger {self.path} cannot be read as one ({error}), so what was "
                f"spent is unknown: with {self.anchor_path.name} beside it, {START_ANEW}"
            )
        return StorageError(
            f"the privacy ledger {self.path} cannot be used ({error}), so nothing was run: check "
            "the disk's free space and the file's permissions"
        )


def last_row(database: sqlite3.Connection) -> Anchor:
    """Return the number and hash of the last row."""
    query = "SELECT seq, hash FROM entries ORDER BY seq DESC LIMIT 1"
    row = database.execute(query).fetchone()
    return START if row is None else Anchor(*row)


def has_row(database: sqlite3.Connection, row: Anchor) -> bool:
    """Return whether a row still stands where it stood."""
    found = database.execute("SELECT hash FROM entries WHERE seq = ?", (row.seq,)).fetchone()
    return found == (row.hash,)


def rows_after(database: sqlite3.Connection, seq: int) -> Iterator[Row]:
    """Yield the rows with a higher number, in order."""
    for number, previous, digest, *fields in database.execute(_SELECT, (seq,)):
        yield Row(number, previous, digest, Entry(*fields))


def now() -> str:
    """Return the time for a new row: UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")
