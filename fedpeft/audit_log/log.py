"""An audit log that is appended to: hash-chained lines, on the disk before ``append`` returns.

*What it guarantees.* An entry is written and synced before ``append`` returns, so what is
done after it is never missing from the log; if it cannot be written, ``append`` raises, and
nothing may be done. Several processes may append: each waits for the other. A line that a
power cut tore was never acknowledged: it is cut away, and an entry says so. Files are
rotated by size, and the chain goes on over them; nothing is ever deleted.

*What it does not.* Somebody with write access to the files can cut off or rewrite what no
checkpoint covers; see ``verification``.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from fedpeft.audit_log.checkpoint import signed
from fedpeft.audit_log.entry import Entry, Kind, Value, checked
from fedpeft.audit_log.segments import (
    Line,
    end_path,
    lines_of,
    read_end,
    segment_numbers,
    segment_path,
)
from fedpeft.errors import AuditLogDamaged, StorageError
from fedpeft.file_lock import exclusive
from fedpeft.privacy.ledger_chain import START, Anchor, write_anchor
from fedpeft.sealing.identity import Identity, PublicIdentity
from fedpeft.storage import explained, sync_directory

ROTATE_BYTES: Final = 4 << 20
CHECKPOINT_EVERY: Final = 64
"""Entries after which the keeper signs again."""
_ADVICE: Final = (
    "run audit-log verify to see what is wrong and keep a copy to look into it; then restore the "
    "folder from a backup, or move it away to begin a new log"
)


def now() -> str:
    """Return the time as it stands in an entry: UTC, with milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


@dataclass(frozen=True, slots=True)
class _Tail:
    """Where a log ends: the last file, its size in bytes, and the last entry."""

    segment: int
    size: int
    place: Anchor
    unsigned: int


class AuditLog:
    """The log in one directory; threads may share it."""

    def __init__(
        self,
        directory: Path,
        *,
        signer: Identity | None = None,
        rotate_bytes: int = ROTATE_BYTES,
        checkpoint_every: int = CHECKPOINT_EVERY,
        clock: Callable[[], str] = now,
    ) -> None:
        """Open the log, or begin one where there is none.

        Args:
            directory: of the log, made with mode 700 if it is not there.
            signer: the identity of whoever keeps the log; without it nothing is signed.
            rotate_bytes: size from which on a new file is begun.
            checkpoint_every: entries between two checkpoints.
            clock: of the entries; replaced only by tests.

        Raises:
            AuditLogDamaged: what is there is not a whole log.
            StorageError: the directory cannot be read or written.
        """
        self.directory = directory
        self._signer = signer
        self._rotate_bytes = rotate_bytes
        self._checkpoint_every = checkpoint_every
        self._clock = clock
        self._mutex = threading.Lock()
        self._known: _Tail | None = None
        self.repaired_bytes = 0
        with explained("make", directory):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._exclusive():
            self._tail()

    def append(self, kind: Kind, about: Mapping[str, Value]) -> Anchor:
        """Write an entry, and a checkpoint where one is due; return the entry's place.

        Raises:
            StorageError: it cannot be written, and what it is about must not be done.
            AuditLogDamaged: the log was changed by something else.
            ValueError: an entry of this kind cannot say this.
        """
        fields = checked(kind, about)
        with self._exclusive():
            place = self._write(kind, fields)
            if self._tail().unsigned >= self._checkpoint_every:
                self._sign()
            return place

    def checkpoint(self) -> Anchor:
        """Sign what is in the log, if there is an identity to sign with; return the end.

        Raises:
            StorageError, AuditLogDamaged: as :meth:`append`.
        """
        with self._exclusive():
            if self._tail().unsigned:
                self._sign()
            return self._tail().place

    @property
    def end(self) -> Anchor:
        """Number and hash of the last entry.

        Raises:
            StorageError, AuditLogDamaged: as :meth:`append`.
        """
        with self._exclusive():
            return self._tail().place

    @contextlib.contextmanager
    def _exclusive(self) -> Generator[None]:
        with self._mutex, exclusive(self.directory / "lock"):
            yield

    def _sign(self) -> None:
        if self._signer is not None:
            self._write("checkpoint", signed(self._tail().place, self._signer))

    def _write(self, kind: Kind, about: Mapping[str, Value]) -> Anchor:
        tail = self._tail()
        if tail.size >= self._rotate_bytes and kind != "checkpoint":
            if tail.unsigned:
                self._sign()
                tail = self._tail()
            tail = _Tail(tail.segment + 1, 0, tail.place, tail.unsigned)
        entry = Entry(
            seq=tail.place.seq + 1,
            time=self._clock(),
            kind=kind,
            about=about,
            previous=tail.place.hash,
        )
        line = entry.to_line()
        # Whatever happens now, the next call looks at the files again.
        self._known = None
        self._append_bytes(segment_path(self.directory, tail.segment), line, tail.size)
        write_anchor(end_path(self.directory), entry.place)
        unsigned = 0 if kind == "checkpoint" else tail.unsigned + 1
        self._known = _Tail(tail.segment, tail.size + len(line), entry.place, unsigned)
        return entry.place

    def _append_bytes(self, path: Path, line: bytes, size: int) -> None:
        """Write and sync a line at the end of a file, or leave the file as it was.

        Raises:
            StorageError: the disk is full, failing or read-only.
        """
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                if os.write(descriptor, line) != len(line):
                    raise OSError(28, "no space left on device")
                os.fsync(descriptor)
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(descriptor, size)
                raise
            finally:
                os.close(descriptor)
            if not size:
                sync_directory(path.parent)
        except OSError as error:
            reason = (error.strerror or type(error).__name__).lower()
            raise StorageError(
                f"cannot write to the audit log {path}: {reason}; what is not logged is not done, "
                "so nothing is sent or received until there is space and the folder can be written"
            ) from error

    def _tail(self) -> _Tail:
        """Return where the log ends, after another process may have written to it."""
        known = self._known
        if known is not None:
            newest = segment_path(self.directory, known.segment + 1)
            path = segment_path(self.directory, known.segment)
            with explained("read", path):
                size = path.stat().st_size if path.exists() else 0
            if size == known.size and not newest.exists():
                return known
        self._known = self._found()
        return self._known

    def _found(self) -> _Tail:
        """Read the last files, cut away what a power cut left, compare with the end noted."""
        numbers = segment_numbers(self.directory)
        noted = read_end(self.directory)
        if not numbers:
            if noted is not None:
                raise self._damaged("its files are gone")
            return _Tail(1, 0, START, 0)
        tail, torn = self._read(numbers)
        place = tail.place
        if (noted is None and place.seq > 1) or (noted is not None and noted.seq > place.seq):
            raise self._damaged("its last entries, or the file that names them, are missing")
        if noted is not None and noted.seq == place.seq and noted != place:
            raise self._damaged("its last entry is not the one that was noted")
        if not torn:
            return tail
        path = segment_path(self.directory, tail.segment)
        with explained("repair", path), path.open("r+b") as file:
            file.truncate(tail.size)
            os.fsync(file.fileno())
        self.repaired_bytes = torn
        self._known = tail
        self._write("repair", {"bytes": torn})
        return self._known

    def _read(self, numbers: list[int]) -> tuple[_Tail, int]:
        """Return the end by the last two files, and how many bytes after it are torn."""
        window = numbers[-2:]
        tail = _Tail(window[0], 0, START, 0)
        first, torn = window[0] > 1, 0
        for number in window:
            tail = _Tail(number, 0, tail.place, tail.unsigned)
            for line in lines_of(segment_path(self.directory, number)):
                if line.is_torn and number == window[-1]:
                    torn += len(line.data)
                    continue
                place, signed_now = self._next(line, None if first else tail.place, torn)
                first = False
                unsigned = 0 if signed_now else tail.unsigned + 1
                tail = _Tail(number, tail.size + len(line.data), place, unsigned)
        return tail, torn

    def _next(self, line: Line, last: Anchor | None, torn: int) -> tuple[Anchor, bool]:
        """Return a line's place, and whether it is a checkpoint; ``last`` None: not known."""
        written = line.read()
        if written is None or not written.is_unchanged or torn:
            raise self._damaged(f"{line.where} was changed")
        entry = written.entry
        if last is not None and (entry.seq, entry.previous) != (last.seq + 1, last.hash):
            raise self._damaged(f"{line.where} does not follow the line before it")
        return entry.place, entry.kind == "checkpoint"

    def _damaged(self, what: str) -> AuditLogDamaged:
        return AuditLogDamaged(
            f"the audit log {self.directory} is damaged ({what}), so it no longer proves what left "
            f"this machine and nothing is sent: {_ADVICE}"
        )


def note_handover(directory: Path, before: PublicIdentity, signer: Identity, name: str) -> None:
    """Note that ``signer`` is the keeper of the log from now on, where ``before`` was.

    To be called once the new identity is on the disk: the checkpoint that follows vouches
    for what the old one has signed.

    Raises:
        StorageError, AuditLogDamaged: the log cannot be written.
    """
    log = AuditLog(directory, signer=signer)
    about = {
        "event": "rotated",
        "name": name,
        "identity": signer.public.fingerprint,
        "before": before.fingerprint,
        "key_before": before.signing_bytes.hex(),
    }
    log.append("key", about)
    log.checkpoint()
