"""Write files so that a crash leaves the old content or the new, never a mixture.

Knows nothing of what the bytes mean.
"""

import contextlib
import errno
import os
import tempfile
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Final

from fedpeft.errors import StorageError

_FULL: Final = "check the disk's free space (df -h), remove what is not needed, and try again"
_NOT_ALLOWED: Final = "check the owner and mode of it and of its folder, or use another account"
_ADVICE: Final[Mapping[int, str]] = {
    errno.ENOENT: "check the path, and that its disk or stick is plugged in",
    errno.ENOTDIR: "check the path: a part of it that should be a folder is a file",
    errno.EISDIR: "name a file",
    errno.EEXIST: "what stands there is kept: name another place",
    errno.ENOTEMPTY: "what stands there is kept: name another place",
    errno.EACCES: _NOT_ALLOWED,
    errno.EPERM: _NOT_ALLOWED,
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: "check the disk's free space, and the limit on the size of a file (ulimit -f)",
    errno.EROFS: "its disk is mounted read-only: mount it for writing, or name another place",
    errno.EIO: "the disk or stick may be failing (dmesg says more): use another one",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "symbolic links lead in a circle there: name the file itself",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
}


def advice_on(error: OSError) -> str:
    """Return what a person can do about ``error``, without a capital or full stop."""
    return _ADVICE.get(error.errno or 0, "check the disk, and who may use what lies there")


@contextlib.contextmanager
def explained(action: str, path: Path) -> Generator[None]:
    """Turn an ``OSError`` in the body into one sentence that names ``path``.

    Raises:
        StorageError: with the action that failed, the path, the system's reason, and what to do.
    """
    try:
        yield
    except OSError as error:
        reason = (error.strerror or type(error).__name__).lower()
        raise StorageError(f"cannot {action} {path}: {reason}; {advice_on(error)}") from error


def require_folder(folder: Path) -> None:
    """Check that the folder is there into which a person has something written.

    Commands make no folders on the way to what a person names: one that is missing is a slip
    of the pen, or a stick that is not plugged in, and secrets would come to lie on another disk.

    Raises:
        StorageError: it is not.
    """
    if folder.exists() and not folder.is_dir():
        raise StorageError(
            f"{folder} is no folder, so nothing can be written into it: check the path"
        )
    if not folder.is_dir():
        raise StorageError(
            f"there is no folder {folder} to write into: make it first, or plug in the disk or "
            "stick that it should be on"
        )


def require_new(path: Path) -> None:
    """Check that ``path`` can become a new file, before any work is done for it.

    A symbolic link counts as a file, also one that leads nowhere.

    Raises:
        StorageError: something is there, or its folder is not.
    """
    if os.path.lexists(path):
        raise StorageError(f"{path} exists; name another file with --out")
    require_folder(path.parent)


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
