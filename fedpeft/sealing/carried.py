"""The form of the small files that a person carries beside rounds: JSON objects of texts.

Requests and tickets of boxes without a network. Specified in docs/spec/stick.md. Must not know
what they ask for.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

from fedpeft.errors import StickRefused
from fedpeft.storage import explained

_Content = TypeVar("_Content")

SCHEMA: Final = 1
FILE_LIMIT: Final = 64 << 10
"""The most bytes that such a file has."""


def read_carried(path: Path, parse: Callable[[bytes], _Content]) -> _Content:
    """Return what ``parse`` makes of the file.

    Raises:
        StickRefused: ``parse`` refused it; the sentence begins with the file's name.
        StorageError: it cannot be read.
    """
    with explained("read", path), path.open("rb") as file:
        content = file.read(FILE_LIMIT + 1)
    try:
        return parse(content)
    except StickRefused as error:
        raise StickRefused(f"{path} {error}") from None


def lengthened(*parts: bytes) -> bytes:
    """Return the parts, each after its length, so that they have one boundary only."""
    return b"".join(len(part).to_bytes(4, "little") + part for part in parts)


def text_of(kind: str, fields: dict[str, Any]) -> str:
    """Return the text of a file of ``kind``."""
    return json.dumps({"fedpeft": kind, "schema": SCHEMA, **fields}, indent=2) + "\n"


def fields_of(kind: str, content: bytes) -> dict[str, Any]:
    """Return the fields of a file of ``kind``, all of them text.

    Raises:
        StickRefused: it is none, damaged, or of another release; of the sentence only what
            comes after the file's name.
    """
    try:
        document: Any = json.loads(content) if len(content) <= FILE_LIMIT else None
        if document.pop("fedpeft") != kind or document.pop("schema") != SCHEMA:
            raise ValueError
        if not all(isinstance(value, str) for value in document.values()):
            raise ValueError
        "".join(document.values()).encode()  # JSON can name half a character
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise not_ours() from None
    return document


def not_ours() -> StickRefused:
    """Return the error of a file that is not what is asked for."""
    return StickRefused(
        "is not the file that is asked for here, or damaged, or of another release: bring an "
        "unchanged copy"
    )
