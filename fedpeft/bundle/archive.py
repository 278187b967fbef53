"""Write a tar file whose bytes follow from its content alone, whole or not at all.

Entries come in the order given, owned by nobody, of one time and of two modes. Knows
nothing of what the files mean.
"""

import contextlib
import hashlib
import io
import os
import tarfile
import tempfile
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from fedpeft.errors import StorageError
from fedpeft.storage import explained, sync_directory

Observe = Callable[[int], None]
"""Told the number of bytes that were done since it was last told."""
_BLOCK: Final = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Member:
    """One file of an archive: its name there, its content, and whether it can be run."""

    name: str
    content: Path | bytes
    executable: bool = False

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size

    def open(self) -> io.BufferedIOBase:
        """Open the content for reading."""
        if isinstance(self.content, bytes):
            return io.BytesIO(self.content)
        return self.content.open("rb")

    def digest(self, observe: Observe) -> str:
        """Return the SHA-256 of the content, hexadecimal.

        Raises:
            StorageError: the file cannot be read.
        """
        with explained("read", Path(self.name)), self.open() as file:
            reader = _Hashing(file, observe)
            while reader.read(_BLOCK):
                pass
        return reader.digest.hexdigest()


class _Readable(Protocol):
    def read(self, size: int = -1, /) -> bytes: ...


class _Hashing:
    """A file that is hashed while it is read."""

    def __init__(self, file: _Readable, observe: Observe) -> None:
        self.digest = hashlib.sha256()
        self._file, self._observe = file, observe

    def read(self, size: int = -1, /) -> bytes:
        data = self._file.read(size)
        self.digest.update(data)
        self._observe(len(data))
        return data


def write_archive(
    path: Path,
    root: str,
    members: Iterable[tuple[Member, str]],
    *,
    moment: int,
    observe: Observe,
) -> str:
    """Write the members, each with its SHA-256, under the folder ``root``; replace ``path``.

    Args:
        path: of the tar file; its folder is made if it is missing.
        root: every name is below it.
        members: in the order that they are written in.
        moment: seconds since the epoch, of every entry.
        observe: told of the bytes.

    Returns:
        The SHA-256 of the tar file, hexadecimal.

    Raises:
        StorageError: the disk is full or read-only, a file cannot be read, or was changed
            since its SHA-256 was taken; ``path`` is left as it was.
    """
    with explained("write", path), _staged(path) as staged:
        with tarfile.open(fileobj=staged, mode="w", format=tarfile.PAX_FORMAT) as archive:
            for name in (root, *_folders(members := list(members), root)):
                archive.addfile(_entry(name, moment, folder=True))
            for member, expected in members:
                _add(archive, root, member, expected, moment, observe)
        staged.flush()
        staged.seek(0)
        return hashlib.file_digest(staged, "sha256").hexdigest()


def _folders(members: list[tuple[Member, str]], root: str) -> list[str]:
    return sorted({f"{root}/{m.name.rpartition('/')[0]}" for m, _ in members if "/" in m.name})


def _add(
    archive: tarfile.TarFile,
    root: str,
    member: Member,
    expected: str,
    moment: int,
    observe: Observe,
) -> None:
    entry = _entry(f"{root}/{member.name}", moment, executable=member.executable)
    entry.size = member.size
    with member.open() as file:
        reader = _Hashing(file, observe)
        archive.addfile(entry, reader)  # pyright: ignore[reportArgumentType]  (only read is used)
    if reader.digest.hexdigest() != expected:
        raise StorageError(
            f"{member.name} changed while the bundle was written, so none was made: start again "
            "when nothing writes to it"
        )


def _entry(
    name: str, moment: int, *, folder: bool = False, executable: bool = False
) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type = tarfile.DIRTYPE if folder else tarfile.REGTYPE
    entry.mode = 0o755 if folder or executable else 0o644
    entry.mtime = moment
    return entry


@contextlib.contextmanager
def _staged(path: Path) -> Generator[io.BufferedRandom]:
    """Yield a temporary file beside ``path`` that takes its place if the body succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    staged = Path(name)
    try:
        with os.fdopen(descriptor, "w+b") as file:
            yield file
            os.fchmod(file.fileno(), 0o644)
            os.fsync(file.fileno())
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)
    sync_directory(path.parent)
