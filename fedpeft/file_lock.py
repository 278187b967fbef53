"""Locks between processes: whoever holds one lets go of it when it ends, however that happens.

Knows nothing of what a lock protects.
"""

import contextlib
import fcntl
import math
import os
import time
from collections.abc import Generator
from pathlib import Path
from typing import Final

from fedpeft.storage import explained

_POLL_S: Final = 0.02
_PRIVATE: Final = 0o600


class LockHeld(Exception):
    """Another process holds the lock; whoever asked for it says what that means."""


@contextlib.contextmanager
def exclusive(path: Path, *, wait_s: float = math.inf) -> Generator[None]:
    """Hold the lock of ``path``, a file that is made if it is missing (mode 600), or a folder.

    Raises:
        LockHeld: another process has held it for ``wait_s`` seconds.
        StorageError: the file cannot be made or opened.
    """
    with explained("lock", path):
        descriptor = _opened(path)
    try:
        _take(descriptor, wait_s)
        yield
    finally:
        os.close(descriptor)


def is_held(path: Path) -> bool:
    """Say whether a process holds the lock of the file ``path``, without taking or making it.

    Raises:
        StorageError: the file cannot be opened.
    """
    if not path.exists():
        return False
    with explained("open", path), path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _opened(path: Path) -> int:
    if path.is_dir():
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, _PRIVATE)


def _take(descriptor: int, wait_s: float) -> None:
    if wait_s == math.inf:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        return
    until = time.monotonic() + wait_s
    while True:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        if time.monotonic() >= until:
            raise LockHeld
        time.sleep(_POLL_S)
