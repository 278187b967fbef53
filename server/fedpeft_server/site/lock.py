"""One server at a time runs on a site's state, and others can see that it does."""

import fcntl
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Final

from fedpeft.errors import StorageError
from fedpeft.storage import explained

_LOCK_FILE: Final = "server.lock"


@contextmanager
def only_server(directory: Path) -> Generator[None]:
    """Hold the directory, so that a second server cannot end this one's run.

    Raises:
        StorageError: another server holds it, or it cannot be used.
    """
    with explained("use the server's directory", directory):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(directory / _LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o600)
    lock: IO[bytes] = os.fdopen(descriptor, "r+b")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StorageError(
                f"another fedpeft-server is running on {directory}: stop it first"
            ) from error
        yield


def server_runs(directory: Path) -> bool:
    """Say whether a server holds the directory.

    Raises:
        StorageError: that cannot be read.
    """
    path = directory / _LOCK_FILE
    if not path.exists():
        return False
    with explained("open", path), path.open("rb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
