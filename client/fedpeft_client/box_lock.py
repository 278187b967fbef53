"""One program at a time takes part with a box.

Two would answer one secure sum twice, and charge one round twice. Must not know what either
of them does.
"""

import contextlib
from collections.abc import Generator
from pathlib import Path
from typing import Final

from fedpeft.errors import StorageError
from fedpeft.file_lock import LockHeld, exclusive

LOCK_FILE: Final = "client.lock"


@contextlib.contextmanager
def only_program(directory: Path) -> Generator[None]:
    """Hold the box in ``directory`` while the body runs; a kill lets go of it.

    Raises:
        StorageError: another program holds it, or the directory cannot be written.
    """
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(exclusive(directory / LOCK_FILE, wait_s=0))
        except LockHeld:
            raise StorageError(
                f"another program takes part with the box {directory}: stop `fedpeft-client "
                "start`, or wait until `fedpeft-client round run` is done"
            ) from None
        yield
