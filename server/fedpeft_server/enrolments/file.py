"""The SQLite file of invitations and clinics: how it is opened, and what a transaction is.

Its tables are in ``migrations``. Must not know what the rows mean.
"""

import sqlite3
from collections.abc import Generator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Final

from fedpeft.errors import StorageError
from fedpeft_server.migrations import HEAD, bring_up

SCHEMA_VERSION: Final = int(HEAD)
_BUSY_S: Final = 10.0
_DAMAGED: Final = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


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
            bring_up(path, timeout_s=_BUSY_S)
        except (OSError, sqlite3.Error) as error:
            raise StorageError(
                f"the enrolment file {path} cannot be used ({error}): "
                "check its rights, or restore it from the backup"
            ) from error

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
        """Yield a connection inside of a transaction, undone if the body raises.

        Raises:
            StorageError: the file is damaged.
        """
        with (
            self._damage_explained(),
            closing(sqlite3.connect(self._path, timeout=_BUSY_S, isolation_level=None)) as database,
        ):
            database.execute("PRAGMA journal_mode = WAL")
            database.execute(f"BEGIN {mode}")
            try:
                yield database
            except BaseException:
                database.execute("ROLLBACK")
                raise
            database.execute("COMMIT")

    @contextmanager
    def _damage_explained(self) -> Generator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            if error.sqlite_errorcode & 0xFF not in _DAMAGED:
                raise
            raise StorageError(
                f"the enrolment file {self._path} is damaged ({error}): stop the server, keep a "
                "copy of the folder, and restore the site from a backup"
            ) from error
