"""The files of an audit log, in order: ``000001.jsonl``, ``000002.jsonl``, and the file
``end`` that names the last entry.

Reads only. Must not know what an entry means.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fedpeft.audit_log.entry import Written, read_line
from fedpeft.errors import AuditLogDamaged, LedgerDamaged
from fedpeft.privacy.ledger_chain import Anchor, read_anchor
from fedpeft.storage import explained

_NAME: Final = re.compile(r"(\d{6})\.jsonl")
LONGEST_LINE: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a file: where it stands, and its bytes with the line feed, if it has one."""

    file: str
    number: int
    data: bytes

    @property
    def where(self) -> str:
        """The place for people."""
        return f"{self.file}, line {self.number}"

    @property
    def is_torn(self) -> bool:
        """Whether it was not written to its end."""
        return not self.data.endswith(b"\n")

    def read(self) -> Written | None:
        """Return the entry; None if the line is none."""
        try:
            return read_line(self.data)
        except (ValueError, RecursionError):
            return None


def segment_path(directory: Path, number: int) -> Path:
    """Return the file with this number, from 1."""
    return directory / f"{number:06d}.jsonl"


def segment_numbers(directory: Path) -> list[int]:
    """Return the numbers of the files that are there, ascending.

    Raises:
        StorageError: the directory cannot be read.
    """
    with explained("read", directory):
        names = [path.name for path in directory.iterdir()] if directory.exists() else []
    return sorted(int(found[1]) for name in names if (found := _NAME.fullmatch(name)))


def lines_of(path: Path) -> Iterator[Line]:
    """Yield the lines of a file; one that is far too long comes in pieces.

    Raises:
        StorageError: it cannot be read.
    """
    with explained("read", path), path.open("rb") as file:
        number = 0
        while data := file.readline(LONGEST_LINE):
            number += 1
            yield Line(path.name, number, data)


def all_lines(directory: Path) -> Iterator[Line]:
    """Yield the lines of all files, in order.

    Raises:
        StorageError: one cannot be read.
    """
    for number in segment_numbers(directory):
        yield from lines_of(segment_path(directory, number))


def end_path(directory: Path) -> Path:
    """Return the file that names the last entry."""
    return directory / "end"


def read_end(directory: Path) -> Anchor | None:
    """Return number and hash of the last entry as noted; None if nothing is.

    Raises:
        StorageError: the file cannot be read.
        AuditLogDamaged: it is damaged.
    """
    path = end_path(directory)
    try:
        return read_anchor(path)
    except LedgerDamaged:
        raise AuditLogDamaged(
            f"{path} does not hold the end of an audit log, so entries may be missing unseen: keep "
            "the folder to look into it, and restore it from a backup or move it away to begin a "
            "new log"
        ) from None
