"""Write files so that a crash leaves the old content or the new, never a mixture.

Knows nothing of what the bytes mean.
"""

import contextlib
import os
import tempfile
from collections.abc import Generator
from pathlib import Path

from fedpeft.errors import StorageError


@contextlib.contextmanager
def explained(action: str, path: Path) -> Generator[None]:
    """Turn an ``OSError`` in the body into one sentence that names ``path``.

    Raises:
        StorageError: with the action that failed, the path and the system's reason.
    """
    try:
        yield
    except OSError as error:
        reason = (error.strerror or type(error).__name__).lower()
        raise StorageError(
            f"cannot {action} {path}: {reason}; check the disk's free space and permissions"
        ) from error


def write_atomically(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Replace ``path`` by ``data``: temporary file, fsync, rename, fsync of the folder.

    ``mode`` holds from the first byte on, so a secret is never readable for a moment.

    Raises:
        StorageError: the disk is full, read-only, or the folder may not be written.
    """
    with explained("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _staged(path, data, mode) as staged:
            staged.replace(path)


def write_once(path: Path, data: bytes, *, mode: int) -> None:
    """Write a new file that appears whole, with ``mode``, or not at all.

    Raises:
        FileExistsError: the file exists; it is left as it was.
        OSError: the folder cannot be written.
    """
    with _staged(path, data, mode) as staged:
        # Unlike rename, a hard link never takes the place of an existing file.
        os.link(staged, path)


@contextlib.contextmanager
def _staged(path: Path, data: bytes, mode: int) -> Generator[Path]:
    """Yield a synced temporary file beside ``path``; afterwards remove it and sync the folder."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    staged = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(file.fileno(), mode)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield staged
    finally:
        staged.unlink(missing_ok=True)
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Make renames inside ``directory`` survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
