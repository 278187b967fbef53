"""A backup's content: the files of a site in a tar archive, and a list of them at its end."""

import hashlib
import io
import json
import os
import re
import tarfile
import tempfile
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Final, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedpeft.errors import StorageError
from fedpeft.sealing.keyfile import Protection
from fedpeft.storage import explained, require_new, sync_directory
from fedpeft_server.backup.container import ChunkReader, ChunkWriter
from fedpeft_server.backup.snapshot import Taken

SCHEMA: Final = 1
_LIST: Final = "backup.json"
_ROUND: Final = re.compile(r"run/rounds/\d+/round\.json")
_LIST_LIMIT: Final = 256 << 20
_COPY_BYTES: Final = 1 << 20


class Listed(BaseModel):
    """A file in a backup."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    size: int = Field(ge=0)
    mode: int = Field(ge=0, le=0o777)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Manifest(BaseModel):
    """What a backup says of itself; ``rounds`` counts round 0."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    schema_: int = Field(alias="schema", default=SCHEMA)
    kind: str = "fedpeft-site"
    release: str
    """Of fedpeft, that made it."""
    created: str
    """UTC, ISO 8601: no later than any change that the backup lacks."""
    federation: str
    identity: str
    """The site's fingerprint."""
    rounds: int
    files: dict[str, Listed]


def write_backup(
    target: Path,
    files: Iterable[Taken],
    protection: Protection,
    about: tuple[str, str],
) -> Manifest:
    """Write ``files`` to ``target``, which appears whole, read again and found good, or not at all.

    Args:
        target: must not exist; its folder must.
        files: in the order in which they are taken.
        protection: how it is encrypted.
        about: the federation's name, and the fingerprint of the site's identity.

    Raises:
        StorageError: ``target`` exists, its folder does not, or it or a file cannot be written or
            read.
    """
    require_new(target)
    created = datetime.now(UTC).isoformat(timespec="seconds")
    with explained("write", target), _staged(target) as (staged, file):
        writer, listed = ChunkWriter(file, protection), dict[str, Listed]()
        with tarfile.open(fileobj=cast("BinaryIO", writer), mode="w|", bufsize=_COPY_BYTES) as tar:
            for each in files:
                listed[each.name] = _put(tar, each)
            manifest = Manifest(
                release=metadata.version("fedpeft"),
                created=created,
                federation=about[0],
                identity=about[1],
                rounds=sum(_ROUND.fullmatch(name) is not None for name in listed),
                files=listed,
            )
            text = manifest.model_dump_json(by_alias=True, indent=1).encode()
            tar.addfile(_head(_LIST, len(text), 0o600), io.BytesIO(text))
        writer.finish()
        file.flush()
        os.fsync(file.fileno())
        if read_backup(staged, protection) != manifest:
            raise StorageError(f"what was written to {target} reads differently: try another disk")
        try:
            os.link(staged, target)
        except FileExistsError:
            raise StorageError(f"{target} exists; name another file with --out") from None
    return manifest


def read_backup(path: Path, protection: Protection, into: Path | None = None) -> Manifest:
    """Read all of a backup, check every byte, and put its files into the folder ``into``, if any.

    Raises:
        StorageError: it is no backup, damaged or cut short, or a file cannot be written.
        KeyLocked: the secret is missing or wrong.
    """
    found: dict[str, Listed] = {}
    text: bytes | None = None
    with explained("read", path), path.open("rb") as file:
        content = io.BufferedReader(ChunkReader(file, protection, str(path)), _COPY_BYTES)
        try:
            with tarfile.open(fileobj=content, mode="r|", bufsize=_COPY_BYTES) as tar:
                for member in tar:
                    data = tar.extractfile(member) if member.isreg() else None
                    if data is None or text is not None or member.name in found:
                        raise _damaged(path)
                    if member.name == _LIST:
                        text = data.read(_LIST_LIMIT)
                    else:
                        found[member.name] = _get(path, member, cast("BinaryIO", data), into)
            while content.read(_COPY_BYTES):
                pass  # what fills the archive up to its end is checked too
        except tarfile.TarError:
            raise _damaged(path) from None
    manifest = _manifest(path, text)
    if manifest.files != found:
        raise _damaged(path)
    return manifest


def _manifest(path: Path, text: bytes | None) -> Manifest:
    try:
        schema = json.loads(text or b"{}").get("schema")
        if schema is not None and schema != SCHEMA:
            raise StorageError(
                f"the list in {path} has the format {schema}, this release reads {SCHEMA}: install "
                "the release that wrote it"
            )
        return Manifest.model_validate_json(text or b"")
    except (ValueError, AttributeError, ValidationError, RecursionError):
        raise _damaged(path) from None


def _put(tar: tarfile.TarFile, each: Taken) -> Listed:
    head = _head(each.name, each.size, each.mode)
    if each.content is not None:
        source: BinaryIO = io.BytesIO(each.content)
    else:
        with explained("read", each.source):
            source = each.source.open("rb")
    with source:
        digested = _Digesting(source)
        try:
            tar.addfile(head, cast("Any", digested))
        except OSError as error:
            if error.errno is None:  # tarfile's own: the file became shorter
                raise StorageError(
                    f"{each.source} was cut short while it was read: back up again"
                ) from None
            raise
    return Listed(size=each.size, mode=each.mode, sha256=digested.hexdigest())


class _Digesting:
    """A file whose bytes are hashed as they are read."""

    def __init__(self, source: BinaryIO) -> None:
        self._source, self._hash = source, hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self._source.read(size)
        self._hash.update(data)
        return data

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def _head(name: str, size: int, mode: int) -> tarfile.TarInfo:
    # Neither times nor owners: the same files are the same bytes.
    head = tarfile.TarInfo(name)
    head.size, head.mode = size, mode
    return head


def _get(path: Path, member: tarfile.TarInfo, data: BinaryIO, into: Path | None) -> Listed:
    name, digest = PurePosixPath(member.name), hashlib.sha256()
    if name.is_absolute() or ".." in name.parts or str(name) != member.name or "\0" in member.name:
        raise _damaged(path)
    if into is None:
        while part := data.read(_COPY_BYTES):
            digest.update(part)
    else:
        place = into / name
        with explained("write", place):
            place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                while part := data.read(_COPY_BYTES):
                    digest.update(part)
                    file.write(part)
                os.fchmod(file.fileno(), member.mode & 0o777)
                file.flush()
                os.fsync(file.fileno())
    return Listed(size=member.size, mode=member.mode & 0o777, sha256=digest.hexdigest())


@contextmanager
def _staged(target: Path) -> Generator[tuple[Path, BinaryIO]]:
    """Yield a temporary file of mode 600 beside ``target``; afterwards it is gone."""
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield Path(name), file
    finally:
        Path(name).unlink(missing_ok=True)
    sync_directory(target.parent)


def _damaged(path: Path) -> StorageError:
    return StorageError(
        f"{path} does not hold what a backup of this release holds: it is damaged or was changed; "
        "take another backup"
    )
