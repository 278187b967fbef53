"""What of a site goes into a backup, and in which order: safe beside a running server.

The order is what makes it consistent. Whatever is taken earlier may only rely on what is
taken later, never the other way round:

1. finished rounds, which never change (their lineages name an entry of the audit log),
2. what lies beside them and in other folders (``released.json`` counts what left: at least
   what the rounds above spent),
3. the audit log up to one moment (it names clinics that were revoked or removed),
4. the enrolments as of one moment (so whom the log calls revoked is revoked here too),
5. configuration and keys, read until two readings are the same (so that a key, its
   certificate and the statements about it belong together).

Must not know how a backup is written.
"""

import sqlite3
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fedpeft.counts import counted
from fedpeft.errors import StorageError
from fedpeft.file_lock import exclusive
from fedpeft.storage import explained

KEYS: Final = "keys"
_DATABASE: Final = "state/enrolment.db"
_LEFT_OUT: Final = {
    "audit/lock",
    "run/adapter",
    "run/summary.json",
    "state/flower.db",
    "state/server.lock",
}
"""Locks; messages that are under way; and what the next start makes from the rounds."""
_LATER: Final = {"audit", KEYS, _DATABASE, "run/rounds"}
_SQLITE_BESIDE: Final = ("-wal", "-shm", "-journal")
_READINGS: Final = 10
_BUSY_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Taken:
    """A file for the backup: its place in the site, its mode, and its content or how much of it."""

    name: str
    mode: int
    source: Path
    size: int
    content: bytes | None = None
    """None: the first ``size`` bytes of ``source``, which are never changed."""


def files_of(site: Path, results: Path, say: Callable[[str], None]) -> Iterator[Taken]:
    """Yield the files of the site, whose run lies in ``results``, in the order above.

    Raises:
        StorageError: a file cannot be read, or is neither a file nor a folder.
    """
    rounds = finished_rounds(results)
    say(f"taking {counted(len(rounds), 'finished round')}")
    for number in rounds:
        yield from _tree(results / "rounds" / str(number), f"run/rounds/{number}")
    if results.is_dir():
        yield from _tree(results, "run")
    for entry in _inside(site):
        # The run was taken from where it is; files beside the folders come last.
        if entry.is_dir() and entry.name != "run" and not _same(entry, results):
            yield from _tree(entry, entry.name)
    say("taking the audit log, the enrolments, configuration and keys")
    yield from _log(site / "audit")
    yield from _enrolments(site / _DATABASE)
    yield from _settled(site)


def finished_rounds(results: Path) -> list[int]:
    """Return the rounds 0, 1, ... up to the first that is not there."""
    rounds: list[int] = []
    while (results / "rounds" / str(len(rounds)) / "round.json").is_file():
        rounds.append(len(rounds))
    return rounds


@contextmanager
def database_copy(path: Path) -> Generator[sqlite3.Connection]:
    """Yield a copy in memory of an SQLite file as of one moment, by SQLite's online backup.

    Raises:
        StorageError: it cannot be read.
    """
    with closing(sqlite3.connect(":memory:")) as copy:
        try:
            with closing(sqlite3.connect(path, timeout=_BUSY_S)) as live:
                live.backup(copy)
        except sqlite3.Error as error:
            raise StorageError(
                f"the database {path} cannot be read ({error}): restore it from a backup"
            ) from error
        yield copy


def _same(one: Path, other: Path) -> bool:
    return other.exists() and one.samefile(other)


def _inside(folder: Path) -> list[Path]:
    """Return what is in a folder, but hidden files: what a kill left half-written."""
    with explained("read", folder):
        found = sorted(folder.iterdir()) if folder.is_dir() else []
    return [each for each in found if not each.name.startswith(".")]


def _tree(folder: Path, name: str) -> Iterator[Taken]:
    """Yield the files below a folder, but those that are taken later or not at all."""
    for entry in _inside(folder):
        place = f"{name}/{entry.name}"
        if place in _LEFT_OUT | _LATER or name in _LATER or place.endswith(_SQLITE_BESIDE):
            continue
        if entry.is_symlink() or not (entry.is_dir() or entry.is_file()):
            raise StorageError(
                f"{entry} is a link or no plain file, so it is not known what a backup of it would "
                "be: put the file itself there, or move the link out of the site"
            )
        if entry.is_dir():
            yield from _tree(entry, place)
        else:
            yield _file(entry, place)


def _file(path: Path, name: str, size: int | None = None) -> Taken:
    with explained("read", path):
        status = path.stat()
        if size is not None or name.startswith("run/rounds/"):
            known = status.st_size if size is None else size
            return Taken(name, status.st_mode & 0o777, path, known)
        # What may be replaced meanwhile is read at once.
        content = path.read_bytes()
    return Taken(name, status.st_mode & 0o777, path, len(content), content)


def _log(directory: Path) -> Iterator[Taken]:
    """Yield the audit log as of one moment, and the file that names its last entry."""
    if not directory.is_dir():
        return
    with exclusive(directory / "lock"), explained("read", directory):
        end = _file(directory / "end", "audit/end") if (directory / "end").exists() else None
        segments = [
            (path, path.stat().st_size) for path in _inside(directory) if path.suffix == ".jsonl"
        ]
        if segments:
            # What a power cut tore was never acknowledged.
            last = segments[-1][0]
            segments[-1] = last, last.read_bytes().rfind(b"\n") + 1
    # Files are appended to only: the first bytes stay as they are.
    for path, size in segments:
        yield _file(path, f"audit/{path.name}", size)
    if end is not None:
        yield end


def _enrolments(path: Path) -> Iterator[Taken]:
    if path.is_file():
        with database_copy(path) as copy:
            content = copy.serialize()
        yield Taken(_DATABASE, 0o600, path, len(content), content)


def _settled(site: Path) -> Iterator[Taken]:
    """Yield configuration and keys, of a moment at which nobody was changing them."""

    def reading() -> list[Taken]:
        beside = [_file(each, each.name) for each in _inside(site) if each.is_file()]
        keys = [_file(each, f"{KEYS}/{each.name}") for each in _inside(site / KEYS)]
        return [*beside, *keys]

    last = reading()
    for _ in range(_READINGS):
        now = reading()
        if now == last:
            yield from now
            return
        last = now
    raise StorageError(
        f"the files in {site / KEYS} change all the time, so no two of them are sure to belong "
        "together: wait until what renews them has ended, and back up again"
    )
