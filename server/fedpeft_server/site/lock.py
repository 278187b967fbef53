"""One server at a time runs on a site's state, and others can see that it does."""

import contextlib
from collections.abc import Generator
from pathlib import Path
from typing import Final

from fedpeft.errors import StorageError
from fedpeft.file_lock import LockHeld, exclusive, is_held
from fedpeft.storage import explained

_LOCK_FILE: Final = "server.lock"


@contextlib.contextmanager
def only_server(directory: Path) -> Generator[None]:
    """Hold the directory, so that a second server cannot end this one's run.

    Raises:
        StorageError: another server holds it, or it cannot be used.
    """
    with explained("use the server's directory", directory):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(exclusive(directory / _LOCK_FILE, wait_s=0))
        except LockHeld:
            raise StorageError(
                f"another fedpeft-server is running on {directory}: stop it first"
            ) from None
        yield


def server_runs(directory: Path) -> bool:
    """Say whether a server holds the directory.

    Raises:
        StorageError: that cannot be read.
    """
    return is_held(directory / _LOCK_FILE)
