"""The secret audit key: which canaries were drawn, which were planted, and who was held out.

It holds made-up secrets and row numbers, and nothing of a real record. Whoever
has it can tell the planted records from the real ones, so it stays with the clinic.
"""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedpeft.errors import DataError
from fedpeft.storage import explained, write_once

SCHEMA = 1
MODE = 0o600
_CHECKSUM = "checksum"
Unit = Literal["patient", "record"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    def __repr__(self) -> str:
        return f"{type(self).__name__}(...)"

    __str__ = __repr__


class Canary(_Part):
    """A made-up patient who has one secret of decimal digits.

    ``included`` is the coin; if it fell on true, the training file has
    ``repetitions`` copies of the record. ``prompt`` is what stands before the
    secret: the question, or the beginning of a plain text.
    """

    repetitions: int = Field(ge=1)
    included: bool
    prompt: str = Field(min_length=1)
    secret: str = Field(pattern=r"^[0-9]{4,32}$")


class HeldUnit(_Part):
    """A real patient (or record) on whom a coin decided; ``rows`` of the original file."""

    rows: tuple[int, ...] = Field(min_length=1)
    member: bool


class Source(_Part):
    """The original training file and how it is read; SHA-256 (hex) over its bytes."""

    file: Path
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    format: str | None
    skip_bad_rows: bool


class AuditKey(_Part):
    """One audit key (schema 1); ``seed`` decides the secrets that canaries are ranked among."""

    version: Annotated[Literal[1], Field(alias="schema")]
    source: Source
    conversation: bool
    """The records are questions and answers; false: plain text."""
    unit: Unit
    seed: str = Field(pattern=r"^[0-9a-f]{64}$")
    canaries: tuple[Canary, ...]
    held: tuple[HeldUnit, ...]


def write_key(key: AuditKey, path: Path) -> None:
    """Write a new key file, readable by its owner only.

    Raises:
        StorageError: the file exists, or the folder cannot be written.
    """
    content = {**key.model_dump(mode="json", by_alias=True), _CHECKSUM: _checksum(key)}
    data = (json.dumps(content, indent=1) + "\n").encode()
    with explained("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_once(path, data, mode=MODE)


def read_key(path: Path) -> AuditKey:
    """Return the key in a file.

    Raises:
        DataError: it is missing, unreadable, damaged, or no audit key.
    """
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        raise DataError(
            f"there is no audit key {path}: name the file that 'fedpeft plant' wrote"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"the audit key {path} cannot be read ({type(error).__name__}): check its owner and "
            "mode, or take another copy"
        ) from None
    try:
        content: Any = json.loads(text)
        stated = ""
        if isinstance(content, dict):
            stated = cast("dict[str, Any]", content).pop(_CHECKSUM, "")
        key = AuditKey.model_validate_json(json.dumps(content))
        if stated == _checksum(key):
            return key
        where = " (its content does not fit its checksum)"
    except (ValueError, RecursionError) as error:
        # Where it is wrong, never what stands there: that may be a secret.
        parts = error.errors()[0]["loc"] if isinstance(error, ValidationError) else ()
        place = ".".join(str(part) for part in parts)
        where = f" at {place}" if place else ""
    raise DataError(
        f"{path} is not an undamaged audit key of schema {SCHEMA}{where}: take another copy of it, "
        "or plant and train again"
    )


def _checksum(key: AuditKey) -> str:
    """Return the SHA-256 (hex) of a key: against slips, not against who may write the file."""
    return hashlib.sha256(key.model_dump_json(by_alias=True).encode()).hexdigest()


def digest(path: Path) -> str:
    """Return the SHA-256 (hex) of a file.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        reason = (error.strerror or type(error).__name__).lower()
    raise DataError(f"cannot read {path}: {reason}: check the path and the file's mode")
