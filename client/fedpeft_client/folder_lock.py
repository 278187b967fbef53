"""A lock on a folder, so that two processes do not change it at once.

It ends with the process that holds it, however that ends. Knows nothing of what lies there.
"""

import contextlib
from collections.abc import Generator
from pathlib import Path
from typing import Final

from fedpeft.errors import StorageError
from fedpeft.file_lock import LockHeld, exclusive
from fedpeft.storage import explained

LOCK_FILE: Final = ".lock"


@contextlib.contextmanager
def locked(directory: Path, *, wait_s: float = 30.0) -> Generator[None]:
    """Hold the lock of ``directory``, which is made if it is missing (mode 700).

    Raises:
        StorageError: another process has held it for ``wait_s`` seconds, or it cannot be made.
    """
    with explained("write", directory):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(exclusive(directory / LOCK_FILE, wait_s=wait_s))
        except LockHeld:
            raise StorageError(
                f"another program has been changing {directory} for {wait_s:g} seconds: stop it, "
                "or try again later"
            ) from None
        yield
