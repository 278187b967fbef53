"""The key that programs on other machines show: a file that only its owner can read."""

import contextlib
import secrets
import stat
from pathlib import Path

from fedpeft.errors import StorageError
from fedpeft.storage import explained, write_once


def load_api_key(path: Path) -> str:
    """Return the key, made on the first call.

    Raises:
        StorageError: other users can read the file, it holds no key, or it cannot be
            read or written.
    """
    # Two that start at once: the first one's key is the one that both read.
    with contextlib.suppress(FileExistsError), explained("write", path):
        if not path.exists():
            write_once(path, f"{secrets.token_urlsafe(32)}\n".encode(), mode=0o600)
    with explained("read", path):
        others = stat.S_IMODE(path.stat().st_mode) & 0o077
        key = path.read_text("utf-8", errors="replace").strip()
    if others:
        raise StorageError(
            f"{path} can be used by other users of this machine: remove it, so that a new key is "
            "made, or run chmod 600 on it if nobody else has read it"
        )
    if len(key) < 32 or not key.isascii():
        raise StorageError(f"{path} holds no key of 32 characters or more: remove it")
    return key
