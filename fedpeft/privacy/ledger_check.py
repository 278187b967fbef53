"""Whether a privacy ledger is what was written: no row edited, missing or moved.

Reads only, and raises nothing about what it finds: each problem is a sentence.
"""

import hashlib
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from functools import cache

from fedpeft.privacy.data_identity import units_digest
from fedpeft.privacy.ledger_chain import Anchor, chain_problems
from fedpeft.privacy.ledger_file import KEY_BYTES, TABLES, rows_after


def ledger_problems(database: sqlite3.Connection, anchor: Anchor | None) -> list[str]:
    """Return a sentence for each thing that is wrong with a ledger; none: it is intact.

    Args:
        database: within a transaction.
        anchor: read before the transaction began, as other processes may append.
    """
    try:
        return [
            *_file_problems(database),
            *chain_problems(rows_after(database, 0), anchor),
            *_key_problems(database),
            *_unit_problems(database),
        ]
    except sqlite3.Error as error:
        return [f"the file cannot be read as a ledger: {error}"]


def _file_problems(database: sqlite3.Connection) -> Iterator[str]:
    for (finding,) in database.execute("PRAGMA quick_check(1)"):
        if finding != "ok":
            yield f"SQLite finds the file damaged: {finding}"
    here, right = _schema(database), _right_schema()
    for name in sorted(right.keys() | here.keys()):
        if here.get(name) != right.get(name):
            yield f"the table, index or trigger {name} is not the one of this ledger format"


def _key_problems(database: sqlite3.Connection) -> Iterator[str]:
    keys = [key for (key,) in database.execute("SELECT key FROM secret")]
    first = database.execute("SELECT kind, digest FROM entries WHERE seq = 1").fetchone()
    if len(keys) != 1 or len(keys[0]) != KEY_BYTES:
        yield "the key of the data identity is missing"
    elif first != ("key", hashlib.sha256(keys[0]).hexdigest()):
        yield "the key of the data identity is not the one that row 1 names"


def _unit_problems(database: sqlite3.Connection) -> Iterator[str]:
    added: dict[int, list[bytes]] = {}
    for value, entry in database.execute("SELECT hash, entry FROM units ORDER BY hash"):
        added.setdefault(entry, []).append(value)
    query = "SELECT seq, dataset, units, digest FROM entries WHERE kind = 'data' ORDER BY seq"
    for seq, dataset, units, digest in database.execute(query):
        found = added.pop(seq, [])
        if len(found) != units or units_digest(found) != digest:
            yield f"the units of data set {dataset} that row {seq} added were changed"
    for entry, found in sorted(added.items()):
        yield f"{len(found)} units name row {entry}, which did not add them"


def _schema(database: sqlite3.Connection) -> dict[str, str | None]:
    return dict(database.execute("SELECT name, sql FROM sqlite_schema"))


@cache
def _right_schema() -> dict[str, str | None]:
    with closing(sqlite3.connect(":memory:")) as database:
        for statement in TABLES:
            database.execute(statement)
        return _schema(database)
