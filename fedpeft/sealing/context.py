"""What a sealed message is about: everything that a replay would have to change."""

import dataclasses
import re
import struct
from dataclasses import dataclass
from typing import Final, Self

from fedpeft.errors import SealingError

PROTOCOL_VERSION: Final = 2
SERVER: Final = "server"
_FIXED: Final = struct.Struct("<HQII32s")
_TEXTS: Final = ("federation", "sender", "receiver", "purpose")
_LONGEST: Final = 255
_BITS: Final = {"run": 64, "round": 32, "attempt": 32}
_HASH: Final = re.compile("[0-9a-f]{64}")


def clinic_role(name: str) -> str:
    """Return the role of the clinic ``name``; never the server's, as names have no colon."""
    return f"clinic:{name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """The place of one message in one federation.

    ``run`` is Flower's run id (64 bits), ``attempt`` counts repetitions of a round
    from 1, ``purpose`` is the message type (``train.keys``; of an answer
    ``train.keys/reply``), ``schema`` the adapter schema's SHA-256 (hex).
    """

    federation: str
    run: int
    round: int
    attempt: int
    sender: str
    receiver: str
    purpose: str
    schema: str

    def answer(self) -> Self:
        """Return the context of the answer to this message."""
        return dataclasses.replace(
            self, sender=self.receiver, receiver=self.sender, purpose=f"{self.purpose}/reply"
        )

    def to_bytes(self) -> bytes:
        """Return the one encoding of this context: fixed fields, then length-prefixed texts.

        Raises:
            SealingError: a field does not fit the format; names it.
        """
        unfit = [
            name for name, bits in _BITS.items() if getattr(self, name) not in range(1 << bits)
        ]
        unfit += [name for name in _TEXTS if not _fits(getattr(self, name))]
        if not _HASH.fullmatch(self.schema):
            unfit.append("schema")
        if unfit:
            raise SealingError(
                f"a message cannot be sealed, as {', '.join(unfit)} of its context is too large or "
                "has characters that are not allowed (docs/spec/sealed-update.md): use shorter, "
                "plain names"
            )
        fixed = _FIXED.pack(
            PROTOCOL_VERSION, self.run, self.round, self.attempt, bytes.fromhex(self.schema)
        )
        texts = (getattr(self, name).encode() for name in _TEXTS)
        return fixed + b"".join(bytes([len(text)]) + text for text in texts)

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read what :meth:`to_bytes` wrote.

        Raises:
            SealingError: it is of another protocol version, or damaged.
        """
        if len(data) < _FIXED.size:
            raise _damaged()
        version, run, number, attempt, schema = _FIXED.unpack_from(data)
        if version != PROTOCOL_VERSION:
            raise SealingError(
                f"a message has protocol version {version}, this release speaks "
                f"{PROTOCOL_VERSION}: install the same fedpeft release on both sides"
            )
        texts: list[str] = []
        at = _FIXED.size
        for _ in _TEXTS:
            end = at + 1 + (data[at] if at < len(data) else 0)
            text = data[at + 1 : end]
            if at >= len(data) or end > len(data) or not _fits(text.decode("latin-1")):
                raise _damaged()
            texts.append(text.decode("ascii"))
            at = end
        if at != len(data):
            raise _damaged()
        federation, sender, receiver, purpose = texts
        return cls(
            federation=federation,
            run=run,
            round=number,
            attempt=attempt,
            sender=sender,
            receiver=receiver,
            purpose=purpose,
            schema=schema.hex(),
        )


CONTEXT_LIMIT: Final = _FIXED.size + len(_TEXTS) * (1 + _LONGEST)
"""The most bytes that a context can have."""


def _fits(text: str) -> bool:
    # Printable, so that a stranger's claim cannot steer the terminal that shows it.
    return len(text) <= _LONGEST and text.isascii() and text.isprintable()


def _damaged() -> SealingError:
    return SealingError("a sealed message is damaged: it is not used")
