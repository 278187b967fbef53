"""One program at a time takes part with a box.

Two would answer one secure sum twice, and charge one round twice. Must not know what either
of them does.
"""

import fcntl
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from fedpeft.errors import StorageError
from fedpeft.storage import explained

LOCK_FILE: Final = "client.lock"
_PRIVATE: Final = 0o600


@contextmanager
def only_program(directory: Path) -> Generator[None]:
    """Hold the box in ``directory`` while the body runs; a kill lets go of it.

    Raises:
        StorageError: another program holds it, or the directory cannot be written.
    """
    path = directory / LOCK_FILE
    with explained("open", path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, _PRIVATE)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StorageError(
                f"another program takes part with the box {directory}: stop `fedpeft-client "
                "start`, or wait until `fedpeft-client round run` is done"
            ) from None
        yield
    finally:
        os.close(descriptor)
