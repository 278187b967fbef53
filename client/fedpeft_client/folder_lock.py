"""A lock on a folder, so that two processes do not change it at once.

It ends with the process that holds it, however that ends. Knows nothing of what lies there.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Generator
from pathlib import Path
from typing import Final

from fedpeft.errors import StorageError
from fedpeft.storage import explained

LOCK_FILE: Final = ".lock"
_POLL_S: Final = 0.02


@contextlib.contextmanager
def locked(directory: Path, *, wait_s: float = 30.0) -> Generator[None]:
    """Hold the lock of ``directory``, which is made if it is missing (mode 700).

    Raises:
        StorageError: another process has held it for ``wait_s`` seconds, or it cannot be made.
    """
    with explained("write", directory):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(directory / LOCK_FILE, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        _wait(descriptor, directory, wait_s)
        yield
    finally:
        os.close(descriptor)


def _wait(descriptor: int, directory: Path, wait_s: float) -> None:
    until = time.monotonic() + wait_s
    while True:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        if time.monotonic() > until:
            raise StorageError(
                f"another program has been changing {directory} for {wait_s:g} seconds: stop it, "
                "or try again later"
            )
        time.sleep(_POLL_S)
