"""A message signed by its sender and sealed to its one reader.

Sign, then encrypt: HPKE's ``info`` and the signature both cover the context and
the reader's identity, so that neither half fits another message. The bytes are
specified in docs/spec/sealed-update.md.
"""

import hashlib
import struct
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

from fedpeft.errors import SealingError, TooLarge, WrongContext
from fedpeft.sealing.context import CONTEXT_LIMIT, Context
from fedpeft.sealing.identity import SIGNATURE_BYTES, Identity, PublicIdentity

MAGIC: Final = b"FPSEAL\x00\x00"
VERSION: Final = 1
_LEAD: Final = struct.Struct("<8sHH")
_DOMAIN: Final = b"fedpeft sealed message, version 1\x00"
_SUITE: Final = Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)

HEADER_LIMIT: Final = _LEAD.size + CONTEXT_LIMIT
_TAG: Final = 16
_SEAL: Final = 1088 + 32 + _TAG
"""Bytes of the ML-KEM-768 ciphertext, the ephemeral X25519 key and the AEAD's tag."""
OVERHEAD_LIMIT: Final = HEADER_LIMIT + _SEAL + SIGNATURE_BYTES
"""The most bytes by which a sealed message is longer than its payload."""
PAYLOAD_LIMIT: Final = 2**31 - 1 - SIGNATURE_BYTES - _TAG
"""The most bytes that can be sealed: OpenSSL's AES-GCM takes 2**31 - 1 at once."""


def seal(payload: bytes, context: Context, *, sender: Identity, receiver: PublicIdentity) -> bytes:
    """Sign ``payload`` with ``sender`` and encrypt it for ``receiver``, bound to ``context``.

    Raises:
        TooLarge: the payload has more than ``PAYLOAD_LIMIT`` bytes.
        SealingError: a field of the context does not fit the format.
    """
    require_sealable(payload)
    about = context.to_bytes()
    header = _LEAD.pack(MAGIC, VERSION, len(about)) + about
    signature = sender.sign(_signed(header, receiver, payload))
    return header + _SUITE.encrypt(signature + payload, receiver.sealing_key, info=header)


def read_context(data: bytes) -> Context:
    """Return the context that a sealed message claims; :func:`open_sealed` proves it.

    Raises:
        SealingError: this is no sealed message of this version.
    """
    header = _header(data)
    return Context.from_bytes(header[_LEAD.size :])


def open_sealed(
    data: bytes,
    expected: Context,
    *,
    sender: PublicIdentity,
    receiver: Identity,
    max_bytes: int,
) -> bytes:
    """Return the payload of a message that ``sender`` sealed for ``receiver`` in this context.

    Raises:
        TooLarge: the payload has more than ``max_bytes``; nothing was decrypted.
        WrongContext: it was sealed for another place; names the fields that differ.
        WrongSignature: somebody else signed it.
        SealingError: it is damaged, or sealed for another key.
    """
    header = _header(data)
    allowed = min(max_bytes, PAYLOAD_LIMIT)
    held = len(data) - len(header) - _SEAL - SIGNATURE_BYTES
    if held > allowed:
        raise TooLarge(
            f"a sealed message from {expected.sender} holds {held} bytes where {allowed} are "
            "allowed: it is not opened; if the sender is right, raise the limit for messages here"
        )
    claimed = Context.from_bytes(header[_LEAD.size :])
    if claimed != expected:
        fields = (name for name in Context.__slots__ if _differ(claimed, expected, name))
        raise WrongContext(
            f"a message from {expected.sender} belongs elsewhere ({', '.join(fields)} differ): "
            "it is not used; if it happens again, tell the central site"
        )
    try:
        plain = _SUITE.decrypt(data[len(header) :], receiver.sealing_key, info=header)
    except (InvalidTag, ValueError):
        plain = b""
    if len(plain) < SIGNATURE_BYTES:
        raise SealingError(
            f"a message from {expected.sender} does not open: it was damaged or changed on its "
            "way, or sealed for a key that was replaced"
        )
    signature, payload = plain[:SIGNATURE_BYTES], plain[SIGNATURE_BYTES:]
    sender.verify(signature, _signed(header, receiver.public, payload), source=expected.sender)
    return payload


def require_sealable(payload: bytes) -> None:
    """Check that AES-GCM can take ``payload`` in one piece.

    Raises:
        TooLarge: it has more than ``PAYLOAD_LIMIT`` bytes.
    """
    if len(payload) > PAYLOAD_LIMIT:
        raise TooLarge(
            f"a message of {len(payload)} bytes cannot be sealed, {PAYLOAD_LIMIT} is the most: "
            "use an adapter of a smaller rank or of fewer modules"
        )


def _differ(claimed: Context, expected: Context, name: str) -> bool:
    return getattr(claimed, name) != getattr(expected, name)


def _header(data: bytes) -> bytes:
    if len(data) < _LEAD.size:
        raise SealingError("a message is too short to be a sealed one: it is not used")
    magic, version, length = _LEAD.unpack_from(data)
    if magic != MAGIC:
        raise SealingError(
            "a message is not sealed: it is not used; install the same fedpeft release on both "
            "sides"
        )
    if version != VERSION:
        raise SealingError(
            f"a sealed message has format version {version}, this release reads {VERSION}: "
            "install the same fedpeft release on both sides"
        )
    return data[: _LEAD.size + length]


def _signed(header: bytes, receiver: PublicIdentity, payload: bytes) -> bytes:
    return _DOMAIN + header + receiver.digest + hashlib.sha256(payload).digest()
