"""The SQLite file of invitations and clinics: its tables, and bringing older files up.

Must not know what the rows mean.
"""

import sqlite3
from collections.abc import Generator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Final

from fedpeft.errors import StorageError

SCHEMA_VERSION: Final = 3
_TABLES: Final = """
CREATE TABLE invitations (
    id TEXT PRIMARY KEY,
    token_sha256 BLOB NOT NULL,
    name TEXT NOT NULL UNIQUE,
    expires_at REAL NOT NULL,
    used_at REAL,
    used_key TEXT
) STRICT;
CREATE TABLE clinics (
    name TEXT PRIMARY KEY,
    public_key TEXT NOT NULL UNIQUE,
    node_id TEXT,
    enrolled_at REAL NOT NULL
) STRICT;
"""
# Schema 2. A clinic of schema 1 keeps NULL: nothing can be sealed to it until it enrols
# again. The first 44 characters are version and signing key (33 bytes), the part that its
# owner proves to hold and that other clinics know it by, so no two clinics may share it.
_IDENTITIES: Final = """
ALTER TABLE clinics ADD COLUMN identity TEXT;
CREATE UNIQUE INDEX clinics_signing_key ON clinics (substr(identity, 1, 44));
"""
# Schema 3. Keys that were revoked or renewed never come back, under whatever name.
_KEY_LIFE: Final = """
ALTER TABLE clinics ADD COLUMN seen_at REAL;
ALTER TABLE clinics ADD COLUMN keys_at REAL;
UPDATE clinics SET keys_at = enrolled_at;
CREATE TABLE retired (
    name TEXT NOT NULL,
    public_key TEXT NOT NULL UNIQUE,
    identity TEXT,
    retired_at REAL NOT NULL,
    why TEXT NOT NULL
) STRICT;
CREATE INDEX retired_signing_key ON retired (substr(identity, 1, 44));
"""
_UPGRADES: Final = {
    0: _TABLES + _IDENTITIES + _KEY_LIFE,
    1: _IDENTITIES + _KEY_LIFE,
    2: _KEY_LIFE,
}


class EnrolmentFile:
    """One SQLite file. Every transaction opens it afresh, so any thread and process may."""

    def __init__(self, path: Path) -> None:
        """Open the file, or make it with mode 600; a file of an older release is brought up.

        Raises:
            StorageError: it cannot be opened, or a newer fedpeft wrote it.
        """
        self._path = path
        try:
            path.touch(mode=0o600)
            with self.transaction() as database:
                version = database.execute("PRAGMA user_version").fetchone()[0]
                if version in _UPGRADES:
                    for statement in _UPGRADES[version].split(";"):
                        database.execute(statement)
                    database.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
                    version = SCHEMA_VERSION
        except (OSError, sqlite3.Error) as error:
            raise StorageError(
                f"the enrolment file {path} cannot be used ({error}): "
                "check its rights, or restore it from the backup"
            ) from error
        if version != SCHEMA_VERSION:
            raise StorageError(
                f"the enrolment file {path} has schema {version}, but this fedpeft knows "
                f"{SCHEMA_VERSION} only: use the fedpeft version that wrote it"
            )

    def stamp(self) -> tuple[int, ...]:
        """Return numbers that change when the file does; cheap enough for every request."""
        found: list[int] = []
        for path in (self._path, self._path.with_name(f"{self._path.name}-wal")):
            try:
                status = path.stat()
                found += [status.st_mtime_ns, status.st_size, status.st_ino]
            except FileNotFoundError:
                found += [0, 0, 0]
        return tuple(found)

    @contextmanager
    def transaction(self, mode: str = "IMMEDIATE") -> Generator[sqlite3.Connection]:
        """Yield a connection inside of a transaction, undone if the body raises."""
        with closing(sqlite3.connect(self._path, timeout=10, isolation_level=None)) as database:
            database.execute("PRAGMA journal_mode = WAL")
            database.execute(f"BEGIN {mode}")
            try:
                yield database
            except BaseException:
                database.execute("ROLLBACK")
                raise
            database.execute("COMMIT")
