"""What stands inside a sealed message: a few named values, then raw bytes."""

import json
import struct
from dataclasses import dataclass, field
from typing import Any, Final, cast

from fedpeft.errors import SealingError

_LENGTH: Final = struct.Struct("<I")
JOB, ADAPTER, CONTENT_KEY = "job", "adapter", "content-key"
"""Fields of a message that begins work: the job as JSON, the digest of what the clinic is
to hold (see parcel.py), and the key of the broadcast that brings it (secret)."""
MAX_RANK: Final = "max-rank"
"""Field of an evaluation's answer: the largest rank that the clinic trains."""
Value = str | int | float


@dataclass(frozen=True, slots=True)
class Payload:
    """``fields`` as one JSON object of strings and numbers, and ``blob`` as it is."""

    fields: dict[str, Value] = field(default_factory=dict[str, Value])
    blob: bytes = b""

    def to_bytes(self) -> bytes:
        """Return the length of the JSON text (u32), the text, and the blob."""
        text = json.dumps(self.fields, allow_nan=False, separators=(",", ":")).encode()
        return _LENGTH.pack(len(text)) + text + self.blob

    @classmethod
    def from_bytes(cls, data: bytes, *, source: str) -> "Payload":
        """Read what :meth:`to_bytes` wrote.

        Raises:
            SealingError: it is not in this form.
        """
        try:
            (length,) = _LENGTH.unpack_from(data)
            end = _LENGTH.size + length
            fields: Any = json.loads(data[_LENGTH.size : end], parse_constant=_refuse)
        except (struct.error, ValueError, RecursionError):
            raise _unreadable(source) from None
        if end > len(data) or not isinstance(fields, dict):
            raise _unreadable(source)
        named = cast("dict[str, Any]", fields)
        for value in named.values():
            if isinstance(value, bool) or not isinstance(value, str | int | float):
                raise _unreadable(source)
        return cls(named, data[end:])

    def text(self, name: str, *, source: str) -> str:
        """Return a string field.

        Raises:
            SealingError: there is none of that name.
        """
        value = self.fields.get(name)
        if not isinstance(value, str):
            raise _unreadable(source)
        return value


def _refuse(name: str) -> float:
    raise ValueError(name)


def _unreadable(source: str) -> SealingError:
    return SealingError(
        f"the content of a message from {source} is not understood: it is not used; install the "
        "same fedpeft release on both sides"
    )
