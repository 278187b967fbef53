"""A file that carries one message between central site and clinic where there is no network.

Inside lies the very message that would go over the network, sealed to its reader; around
it stand the place that it belongs to, a checksum and its sender's signature, so that a lost,
old, foreign or damaged file is told apart before anything is opened. Specified in
docs/spec/stick.md. Must not know Flower, keys at rest, or what a message is about.
"""

import hashlib
import json
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, Self

from fedpeft.errors import SealingError, StickRefused, WrongSignature
from fedpeft.sealing import SERVER, Context, Identity, PublicIdentity, clinic_role, read_context
from fedpeft.sealing.identity import SIGNATURE_BYTES
from fedpeft.storage import explained

MAGIC: Final = b"FPSTICK\x01"
"""The last byte is the version of the format."""
SUFFIX: Final = ".fedpeft"
_LENGTH: Final = struct.Struct("<I")
_CHECKSUM_BYTES: Final = 32
_HEADER_LIMIT: Final = 4096
_DOMAIN: Final = b"fedpeft stick file, version 1\x00"
_REASON: Final = re.compile(r"([a-z]+(-[a-z]+){0,5})?")
_HASH: Final = re.compile(r"[0-9a-f]{64}")

FileKind = Literal["question", "answer"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StickFile:
    """One message.

    ``context`` is the place of the question, also in the file of an answer, and
    ``question`` the SHA-256 (hex) of the question's sealed bytes. An answer has either
    ``sealed`` bytes or the ``reason`` word for which there are none.
    """

    kind: FileKind
    context: Context
    question: str
    sealed: bytes = field(default=b"", repr=False)
    broadcast: bytes | None = field(default=None, repr=False)
    reason: str = ""

    @property
    def clinic(self) -> str:
        """The clinic's name."""
        return self.context.receiver.removeprefix(clinic_role(""))

    @property
    def name(self) -> str:
        """A name for the file, which says nothing that the file does not show."""
        about = self.context
        return (
            f"{about.federation}-{self.clinic}-round{about.round}-{about.purpose}"
            f"-{self.question[:8]}.{self.kind}{SUFFIX}"
        )

    def answered(self, *, sealed: bytes = b"", reason: str = "") -> Self:
        """Return the file that answers this question."""
        return type(self)(
            kind="answer",
            context=self.context,
            question=self.question,
            sealed=sealed,
            reason=reason,
        )

    def to_bytes(self, signer: Identity) -> bytes:
        """Return the file's bytes, signed by the sender."""
        about = self.context
        header = {
            "attempt": about.attempt,
            "broadcast": None if self.broadcast is None else len(self.broadcast),
            "clinic": self.clinic,
            "federation": about.federation,
            "kind": self.kind,
            "purpose": about.purpose,
            "question": self.question,
            "reason": self.reason,
            "round": about.round,
            "run": str(about.run),
            "schema": about.schema,
            "sealed": len(self.sealed),
        }
        text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
        parts = (MAGIC, _LENGTH.pack(len(text)), text, self.sealed, self.broadcast or b"")
        checksum = hashlib.sha256()
        for part in parts:
            checksum.update(part)
        digest = checksum.digest()
        return b"".join((*parts, digest, signer.sign(_DOMAIN + digest)))


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadFile:
    """A file that is whole; who signed it is still to be checked. ``content`` are its bytes."""

    file: StickFile
    content: bytes = field(repr=False)
    digest: bytes
    signature: bytes

    def signed_by(self, sender: PublicIdentity, *, source: str) -> StickFile:
        """Return the content, if ``sender`` signed it.

        Raises:
            StickRefused: somebody else did.
        """
        try:
            sender.verify(self.signature, _DOMAIN + self.digest, source=source)
        except WrongSignature:
            raise StickRefused(
                f"was not signed by {source} as it is known here: it is foreign or forged and is "
                "not used"
            ) from None
        return self.file


def question_file(sealed: bytes, broadcast: bytes | None) -> StickFile:
    """Return the file of what the server asks; ``sealed`` says itself where it belongs.

    Raises:
        SealingError: it is no sealed message.
    """
    return StickFile(
        kind="question",
        context=read_context(sealed),
        question=hashlib.sha256(sealed).hexdigest(),
        sealed=sealed,
        broadcast=broadcast,
    )


def read_stick_file(path: Path, max_bytes: int) -> ReadFile:
    """Read a file of at most ``max_bytes``.

    Raises:
        StickRefused: it is none, damaged, too large, or of another release; of the sentence
            only what comes after the file's name.
        StorageError: it cannot be read.
    """
    with explained("read", path), path.open("rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise StickRefused(
            f"is larger than the {max_bytes} bytes that are taken here: raise max_message_mb if "
            "you expect that much"
        )
    return parse_stick_file(content)


def parse_stick_file(content: bytes) -> ReadFile:
    """Read the bytes of a file.

    Raises:
        StickRefused: see :func:`read_stick_file`.
    """
    if content[:7] != MAGIC[:7]:
        raise StickRefused("is no file of a fedpeft round: name one that export or run wrote")
    if content[: len(MAGIC)] != MAGIC:
        raise StickRefused(
            f"has format version {content[7:8].hex() or 'none'}, this release reads "
            f"{MAGIC[-1]:02x}: install the same fedpeft release on both sides"
        )
    end = len(content) - _CHECKSUM_BYTES - SIGNATURE_BYTES
    digest = content[max(end, 0) : end + _CHECKSUM_BYTES]
    if end < len(MAGIC) + _LENGTH.size or hashlib.sha256(content[:end]).digest() != digest:
        raise _damaged()
    return ReadFile(
        file=_parsed(content[:end]),
        content=content,
        digest=digest,
        signature=content[-SIGNATURE_BYTES:],
    )


def _parsed(content: bytes) -> StickFile:
    at = len(MAGIC) + _LENGTH.size
    (length,) = _LENGTH.unpack_from(content, len(MAGIC))
    if length > min(_HEADER_LIMIT, len(content) - at):
        raise _damaged()
    try:
        header: Any = json.loads(content[at : at + length])
        context = Context(
            federation=header["federation"],
            run=int(header["run"]),
            round=int(header["round"]),
            attempt=int(header["attempt"]),
            sender=SERVER,
            receiver=clinic_role(header["clinic"]),
            purpose=header["purpose"],
            schema=header["schema"],
        )
        context.to_bytes()  # refuses what does not fit
        body, sealed, broadcast = content[at + length :], header["sealed"], header["broadcast"]
        if len(body) != sealed + (broadcast or 0) or min(sealed, broadcast or 0) < 0:
            raise ValueError
        found = StickFile(
            kind=header["kind"],
            context=context,
            question=header["question"],
            sealed=body[:sealed],
            broadcast=None if broadcast is None else body[sealed:],
            reason=header["reason"],
        )
        _require_consistent(found)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, SealingError):
        raise _damaged() from None
    return found


def _require_consistent(found: StickFile) -> None:
    """Check that the header says of the sealed bytes what they claim themselves.

    Raises:
        ValueError, SealingError: it does not.
    """
    known = _HASH.fullmatch(found.question) and _REASON.fullmatch(found.reason)
    if found.kind == "question":
        fits = found == question_file(found.sealed, found.broadcast)
    else:
        answers = not found.sealed or read_context(found.sealed) == found.context.answer()
        one = bool(found.sealed) != bool(found.reason)
        fits = found.kind == "answer" and answers and one and found.broadcast is None
    if not known or not fits:
        raise ValueError


def _damaged() -> StickRefused:
    return StickRefused("is damaged: copy it again, or write it anew and bring that one")
