"""The revisions of ``state/enrolment.db``, made by alembic, and how a file is brought up to them.

To add one, put a file into ``versions/`` and touch nothing else:

* Its name is the next number of four digits and a few words: ``0004_carrier.py``.
* ``revision = "0004"`` and ``down_revision = "0003"``; ``upgrade()`` calls ``op.execute`` once
  for each statement of SQL. There is no ``downgrade``: the way back is a backup.
* Let nothing in it depend on the rest of fedpeft, which will have changed when it runs.
* A file that is out in a release is never changed again.

The number of the newest file is the schema that a release writes. It also stands in SQLite's
``user_version``, by which releases before alembic (schemas 1 to 3) recognise a file that is
too new for them; a file of theirs is stamped with that number before it goes on.
"""

import re
import sqlite3
from pathlib import Path
from typing import Final

from fedpeft.errors import StorageError

_VERSIONS: Final = Path(__file__).parent / "versions"
_NUMBER: Final = re.compile(r"[0-9]{4}")
HEAD: Final = max(path.name[:4] for path in _VERSIONS.glob("[0-9]*_*.py"))
"""The newest revision, read from the names of the files, as alembic takes long to import."""


def bring_up(path: Path, *, timeout_s: float) -> None:
    """Make the tables of a new file, or bring a file of an older release to :data:`HEAD`.

    One transaction: a kill leaves the old schema or the new one. Of several processes that
    do it at once one does, and the others wait for it. Costs one query where nothing is to
    be done.

    Raises:
        StorageError: a newer fedpeft wrote it.
        sqlite3.Error: it is no database, damaged, busy for longer than ``timeout_s``, or
            its tables are not those of the schema that it claims.
    """
    if _found(path, timeout_s) == (HEAD, int(HEAD)):
        return
    from fedpeft_server.migrations.upgrade import upgrade

    upgrade(path, HEAD, timeout_s=timeout_s)


def _found(path: Path, timeout_s: float) -> tuple[str | None, int]:
    """Return alembic's revision, None if it has not been here, and the number of the schema."""
    database = sqlite3.connect(path, timeout=timeout_s)
    try:
        database.execute("PRAGMA journal_mode = WAL")
        number = database.execute("PRAGMA user_version").fetchone()[0]
        named = database.execute("SELECT 1 FROM sqlite_master WHERE name = 'alembic_version'")
        row = None
        if named.fetchone():
            row = database.execute("SELECT version_num FROM alembic_version").fetchone()
    finally:
        database.close()
    revision = row[0] if row else None
    if number < 0 or not (revision is None or _NUMBER.fullmatch(revision)):
        raise sqlite3.DatabaseError(f"its schema {revision or number} is none of fedpeft's")
    newest = max(number, int(revision or 0))
    if newest > int(HEAD):
        raise StorageError(
            f"the enrolment file {path} has schema {newest}, but this fedpeft knows those up to "
            f"{int(HEAD)}: use the fedpeft version that wrote it"
        )
    return revision, number
