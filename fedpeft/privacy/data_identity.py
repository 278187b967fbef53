"""Which data set a set of records is: known by its units, not by the name of a file.

A unit is what a job protects: a patient, or a record where there are no patients. Of
each unit the ledger keeps HMAC-SHA256 under a random key, cut to 16 bytes, so that it
recognises a unit and does not name it. The key lies in the same file, as losing it
would reset the identity; so whoever can read the file can test whether a guessed id is in
it. That is why the file has mode 600 and never leaves the box.

Two sets that share a unit are one data set from then on, because the shared unit pays
for both. Must not know what a step costs.
"""

import hashlib
import hmac
import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from fedpeft.errors import DataError
from fedpeft.privacy.ledger_chain import Entry
from fedpeft.privacy.ledger_file import LedgerFile, now

_HASH_BYTES: Final = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """A data set of the ledger, and what a set of records had in common with it.

    ``new``: no unit was known, so nothing is spent yet. ``known`` and ``added`` count the
    units that it had already and those that it got. ``merged`` names data sets that
    turned out to be parts of it: their charges count with its own from now on.
    """

    id: int
    new: bool
    known: int
    added: int
    merged: tuple[int, ...] = ()


def identify(file: LedgerFile, database: sqlite3.Connection, units: Iterable[str]) -> Dataset:
    """Return the data set of ``units``, in an immediate transaction of ``file``.

    Raises:
        DataError: there is no unit.
    """
    (key,) = database.execute("SELECT key FROM secret").fetchone()
    hashes = {_unit_hash(key, unit) for unit in units}
    if not hashes:
        raise DataError("a data set without records has no privacy ledger: name a file with some")
    entries = dict(database.execute("SELECT hash, entry FROM units"))
    known = hashes & entries.keys()
    found = sorted(_datasets_of(database, {entries[digest] for digest in known}))
    dataset = found[0] if found else _next_dataset(database)
    for other in found[1:]:
        file.append(Entry("merge", now(), dataset=dataset, other=other))
    fresh = sorted(hashes - known)
    if fresh:
        added = Entry("data", now(), dataset=dataset, units=len(fresh), digest=units_digest(fresh))
        entry = file.append(added)
        database.executemany(
            "INSERT INTO units (hash, entry) VALUES (?, ?)", ((digest, entry) for digest in fresh)
        )
    return Dataset(
        id=dataset,
        new=not found,
        known=len(known),
        added=len(fresh),
        merged=tuple(found[1:]),
    )


def units_digest(hashes: Iterable[bytes]) -> str:
    """Return the digest of keyed hashes, which come sorted, for a row of kind ``data``."""
    digest = hashlib.sha256()
    for value in hashes:
        digest.update(value)
    return digest.hexdigest()


def merged_into(database: sqlite3.Connection) -> dict[int, int]:
    """Return for each data set that there ever was the one that it is part of now."""
    query = "SELECT DISTINCT dataset FROM entries WHERE kind = 'data'"
    root = {dataset: dataset for (dataset,) in database.execute(query)}
    merges = "SELECT dataset, other FROM entries WHERE kind = 'merge' ORDER BY seq"
    for dataset, other in database.execute(merges).fetchall():
        root = {part: dataset if whole == other else whole for part, whole in root.items()}
    return root


def parts_of(database: sqlite3.Connection, dataset: int) -> tuple[int, ...]:
    """Return all data sets that are one with ``dataset``, itself included, sorted.

    Raises:
        ValueError: the ledger has no such data set.
    """
    roots = merged_into(database)
    if dataset not in roots:
        raise ValueError(f"the ledger has no data set {dataset}")
    return tuple(sorted(part for part, root in roots.items() if root == roots[dataset]))


def _unit_hash(key: bytes, unit: str) -> bytes:
    return hmac.digest(key, unit.encode(), "sha256")[:_HASH_BYTES]


def _datasets_of(database: sqlite3.Connection, entries: set[int]) -> set[int]:
    roots = merged_into(database)
    rows = database.execute("SELECT seq, dataset FROM entries WHERE kind = 'data'")
    return {roots[dataset] for seq, dataset in rows if seq in entries}


def _next_dataset(database: sqlite3.Connection) -> int:
    query = "SELECT coalesce(max(dataset), 0) + 1 FROM entries WHERE kind = 'data'"
    return database.execute(query).fetchone()[0]
