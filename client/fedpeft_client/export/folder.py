"""A folder that appears whole or not at all. Knows nothing of what is written into it."""

import os
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from fedpeft.errors import FedpeftError, StorageError
from fedpeft.storage import explained, require_folder, sync_directory


@contextmanager
def new_folder(out: Path) -> Generator[Path]:
    """Yield a hidden folder beside ``out`` that takes its place when the body has ended well.

    Otherwise it is removed with all that is in it. Only its owner may read it: an adapted
    model can give away text of the records that it was trained on.

    Errors of the body name ``out`` where they would name the hidden folder.

    Raises:
        StorageError: ``out`` holds something, is a mounted disk, or cannot be written.
    """
    out = out.resolve()
    with explained("write", out):
        _require_vacant(out)
        require_folder(out.parent)
        staged = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        try:
            with _named(staged, out):
                yield staged
            _sync(staged)
            staged.replace(out)
            sync_directory(out.parent)
        finally:
            shutil.rmtree(staged, ignore_errors=True)


@contextmanager
def _named(staged: Path, out: Path) -> Generator[None]:
    """Let errors name ``out``, which a person asked for and knows.

    Raises:
        StorageError: a library says only that a file could not be written, not why.
    """
    try:
        yield
    except FedpeftError as error:
        text = str(error).replace(str(staged), str(out))
        raise type(error)(text) from error
    except OSError as error:
        if error.strerror is not None:
            raise
        raise StorageError(
            f"cannot write {out}: a file could not be written in full; check the disk's free "
            "space (df -h), and name a folder on another disk with --out if it is full"
        ) from error


def require_space(folder: Path, needed: int, what: str) -> None:
    """Check before the work that ``needed`` bytes are free where ``folder`` lies.

    Raises:
        StorageError: they are not; says how many are needed for ``what``.
    """
    with explained("look at", folder):
        free = shutil.disk_usage(folder).free
    if free < needed:
        raise StorageError(
            f"{what} needs about {_mib(needed)} MiB in {folder.parent}, where {_mib(free)} are "
            "free; free some space, or name a folder on another disk with --out"
        )


def _mib(count: int) -> int:
    return -(-count // 2**20)


def _require_vacant(out: Path) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise StorageError(f"{out} is a file; name a new folder with --out")
    if any(out.iterdir()):
        raise StorageError(f"{out} is not empty; name a new folder with --out")
    # Nothing can take the place of a mount point, which would be found out only at the end.
    if os.path.ismount(out):
        raise StorageError(f"{out} is a whole disk; name a new folder on it with --out")


def _sync(folder: Path) -> None:
    """Make the content of ``folder`` survive a power cut."""
    for directory, _, names in os.walk(folder):
        for name in names:
            descriptor = os.open(Path(directory) / name, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_directory(Path(directory))
