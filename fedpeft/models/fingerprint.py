"""The identity of a base model: SHA-256 over its weight files.

Both sides compare it before a step is trained, so that nobody averages
adapters of different models.
"""

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import cast

from fedpeft.errors import FingerprintMismatch, ModelError, StorageError
from fedpeft.models.source import weight_files
from fedpeft.storage import write_atomically

_CHUNK_BYTES = 1 << 20
_digests: dict[tuple[Path, int, int, int, int], str] = {}
"""Digests that this process has seen, by path, size, inode and times of change."""


def fingerprint(directory: Path) -> str:
    """Return the SHA-256 (hex) over names and contents of all safetensors files.

    Hashing a large model takes a while, so the digest of each file is cached in
    ``$XDG_CACHE_HOME/fedpeft`` under its path, size, inode, and times of change.

    Raises:
        ModelError: a weight file cannot be read.
    """
    whole = hashlib.sha256()
    for path in weight_files(directory):
        whole.update(f"{path.name}\0{_file_digest(path)}\n".encode())
    return whole.hexdigest()


def require_fingerprint(found: str, expected: str, directory: Path) -> None:
    """Check that the base model in ``directory`` is the one that was agreed.

    Raises:
        FingerprintMismatch: it is another.
    """
    if found != expected:
        raise FingerprintMismatch(
            f"the base model in {directory} has fingerprint {found[:12]}, the federation uses "
            f"{expected[:12]}; copy the federation's base model here"
        )


def _file_digest(path: Path) -> str:
    try:
        status = path.stat()
        state = (path, status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns)
        if (remembered := _digests.get(state)) is not None:
            return remembered
        stamp = ":".join(str(part) for part in (path.resolve(), *state[1:]))
        cache = _cache_directory() / f"{hashlib.sha256(stamp.encode()).hexdigest()}.json"
        if (known := _read_cache(cache)) is not None:
            return _digests.setdefault(state, known)
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
    except OSError as error:
        raise ModelError(
            f"{path} cannot be read: {error.strerror}; check its permissions"
        ) from None
    # Only a cache: where it cannot be written, the next start hashes again.
    with contextlib.suppress(StorageError):
        write_atomically(cache, json.dumps({"schema": 1, "sha256": digest.hexdigest()}).encode())
    return _digests.setdefault(state, digest.hexdigest())


def _cache_directory() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "fedpeft" / "fingerprints"


def _read_cache(path: Path) -> str | None:
    try:
        content = cast("object", json.loads(path.read_text("utf-8")))
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict):
        return None
    known = cast("dict[str, object]", content)
    digest = known.get("sha256")
    return digest if isinstance(digest, str) and known.get("schema") == 1 else None
