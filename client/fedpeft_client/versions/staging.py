"""How things come into the store's folder and leave it: whole, by one rename.

What a killed process left unfinished has a name that begins with ``HALF``, and is removed
by whoever changes the store next.
"""

import shutil
import time
from pathlib import Path
from typing import Final

from fedpeft.storage import explained, sync_directory

HALF: Final = ".half-"


def half_in(directory: Path) -> Path:
    """Return a path of no file yet; the store's lock is held."""
    return directory / f"{HALF}{time.monotonic_ns()}"


def move(path: Path, target: Path) -> None:
    """Rename durably.

    Raises:
        StorageError: that cannot be done.
    """
    with explained("write", target):
        path.rename(target)
        for folder in {path.parent, target.parent}:
            sync_directory(folder)


def delete(path: Path) -> None:
    """Delete a file, a link or a folder with all that is in it.

    Raises:
        StorageError: that cannot be done.
    """
    with explained("remove", path):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
