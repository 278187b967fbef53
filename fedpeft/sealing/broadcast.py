"""One ciphertext for all clinics: a large adapter is encrypted once, its key sealed to each.

The key and the ciphertext's digest travel in each clinic's own sealed message,
signed, so a clinic knows that these are the bytes the server meant for it.
"""

import hashlib
import hmac
import secrets
from dataclasses import dataclass, field
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from fedpeft.errors import SealingError
from fedpeft.sealing.envelope import require_sealable

MAGIC: Final = b"FPCAST\x00\x01"
"""The last byte is the version of the format."""
_KEY, _NONCE, _DIGEST = 32, 12, 32


@dataclass(frozen=True, slots=True)
class ContentKey:
    """What opens one broadcast: its AES-256-GCM key and the SHA-256 of its bytes."""

    key: bytes = field(repr=False)
    digest: bytes

    def to_bytes(self) -> bytes:
        """Return key and digest, 64 bytes; secret."""
        return self.key + self.digest

    @classmethod
    def from_bytes(cls, data: bytes) -> "ContentKey":
        """Read what :meth:`to_bytes` wrote.

        Raises:
            SealingError: it has another length.
        """
        if len(data) != _KEY + _DIGEST:
            raise SealingError("the key of a broadcast is damaged: the message is not used")
        return cls(data[:_KEY], data[_KEY:])


def seal_broadcast(payload: bytes) -> tuple[bytes, ContentKey]:
    """Encrypt ``payload`` under a fresh key; return the bytes for everyone and the key.

    Raises:
        TooLarge: the payload has more than ``PAYLOAD_LIMIT`` bytes.
    """
    require_sealable(payload)
    key, nonce = secrets.token_bytes(_KEY), secrets.token_bytes(_NONCE)
    data = MAGIC + nonce + AESGCM(key).encrypt(nonce, payload, MAGIC)
    return data, ContentKey(key, hashlib.sha256(data).digest())


def open_broadcast(data: bytes, content_key: ContentKey) -> bytes:
    """Return the payload of a broadcast.

    Raises:
        SealingError: these are not the bytes that the key was sealed for, or of another version.
    """
    lead = len(MAGIC) + _NONCE
    if not hmac.compare_digest(hashlib.sha256(data).digest(), content_key.digest):
        raise SealingError(
            "the adapter that came is not the one that the server signed for this clinic: "
            "it is not used"
        )
    if data[: len(MAGIC)] != MAGIC:
        raise SealingError(
            "the adapter that came has a format that this release does not read: install the "
            "same fedpeft release on both sides"
        )
    try:
        return AESGCM(content_key.key).decrypt(data[len(MAGIC) : lead], data[lead:], MAGIC)
    except (InvalidTag, ValueError, OverflowError):
        raise SealingError("the adapter that came does not open: it is not used") from None
