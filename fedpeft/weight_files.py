"""The weight files of a base model, and their identity: SHA-256 over names and contents.

Knows the files' names, not what stands in them. Both sides of a federation compare the
identity before a step is trained, so that nobody averages adapters of different models.
"""

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import cast

from fedpeft.errors import ModelError, StorageError
from fedpeft.storage import write_atomically

GGUF_SUFFIX = ".gguf"
_CHUNK_BYTES = 1 << 20
_digests: dict[tuple[Path, int, int, int, int], str] = {}
"""Digests that this process has seen, by path, size, inode and times of change."""


def is_gguf(base: Path) -> bool:
    """Say whether a base model is one GGUF file, and not a directory."""
    return base.suffix == GGUF_SUFFIX and not base.is_dir()


def weight_files(base: Path) -> list[Path]:
    """Return the safetensors files of a model directory, sorted by name, or the GGUF file."""
    return [base] if is_gguf(base) else sorted(base.glob("*.safetensors"))


def fingerprint(base: Path) -> str:
    """Return the SHA-256 (hex) over names and contents of all weight files.

    A GGUF file counts under one name for all, for clinics call the same file differently.
    Hashing a large model takes a while, so the digest of each file is cached in
    ``$XDG_CACHE_HOME/fedpeft`` under its path, size, inode, and times of change.

    Raises:
        ModelError: a weight file cannot be read.
    """
    whole = hashlib.sha256()
    for path in weight_files(base):
        name = GGUF_SUFFIX if is_gguf(base) else path.name
        whole.update(f"{name}\0{_file_digest(path)}\n".encode())
    return whole.hexdigest()


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
