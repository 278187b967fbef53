"""Secrets that two clinics share and the server does not: X25519, HKDF-SHA256, AES-256-GCM.

Every derivation names the session, the roster, the pair and the purpose, so a key
never serves twice (RFC 7748, RFC 5869).
"""

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final, Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedpeft.errors import BadShare
from fedpeft.sealing.identity import KEY_BYTES, usable_x25519

TAG_BYTES: Final = 16
# Each key encrypts one message only.
_NONCE: Final = bytes(12)


@dataclass(frozen=True)
class EphemeralKey:
    """An X25519 private key of one session: 32 bytes, and so a secret that can be shared out."""

    private: bytes = field(repr=False)

    @classmethod
    def generate(cls) -> Self:
        """Return a fresh key from the system's randomness."""
        return cls(X25519PrivateKey.generate().private_bytes_raw())

    @cached_property
    def public(self) -> bytes:
        """The public key, 32 bytes."""
        return self._key.public_key().public_bytes_raw()

    @cached_property
    def _key(self) -> X25519PrivateKey:
        return X25519PrivateKey.from_private_bytes(self.private)

    def derive(self, peer: bytes, purpose: str, bound_to: bytes, names: tuple[str, str]) -> bytes:
        """Return 32 bytes that the holder of ``peer``'s private key derives as well.

        Raises:
            BadShare: ``peer`` is no usable public key.
        """
        try:
            shared = self._key.exchange(X25519PublicKey.from_public_bytes(peer))
        except ValueError:
            raise BadShare(
                f"the key of one of {names[0]} and {names[1]} is unusable: the round is left"
            ) from None
        parts = (purpose.encode(), bound_to, *(name.encode() for name in names))
        info = b"".join(len(part).to_bytes(4) + part for part in parts)
        return HKDF(hashes.SHA256(), KEY_BYTES, None, info).derive(shared)


def require_usable(public: bytes, source: str) -> None:
    """Refuse an X25519 key of small order, whose secrets with all others are the same zeros.

    Raises:
        BadShare: it is one.
    """
    try:
        usable_x25519(public)
    except ValueError:
        raise BadShare(
            f"a key of {source} is unusable, as anybody can derive its secrets: it is not used"
        ) from None


def mask_seed(own: EphemeralKey, peer: bytes, bound_to: bytes, names: tuple[str, str]) -> bytes:
    """Return the seed of the mask between two clinics, the same on both sides."""
    return own.derive(peer, "mask", bound_to, (min(names), max(names)))


def lock(
    own: EphemeralKey, peer: bytes, bound_to: bytes, sender: str, receiver: str, content: bytes
) -> bytes:
    """Encrypt ``content`` from one clinic to another; 16 bytes longer than it."""
    key = own.derive(peer, "share", bound_to, (sender, receiver))
    return AESGCM(key).encrypt(_NONCE, content, None)


def unlock(
    own: EphemeralKey, peer: bytes, bound_to: bytes, sender: str, receiver: str, box: bytes
) -> bytes:
    """Decrypt what :func:`lock` made on the other side.

    Raises:
        BadShare: it was changed, replayed from another session, or made under another roster.
    """
    key = own.derive(peer, "share", bound_to, (sender, receiver))
    try:
        return AESGCM(key).decrypt(_NONCE, box, None)
    except (InvalidTag, ValueError):
        raise BadShare(
            f"the share of clinic {sender} does not open: it was changed, is of another round, or "
            "the server gave the two clinics different lists; the round is left"
        ) from None


def commitment(secret: bytes, bound_to: bytes) -> bytes:
    """Return a SHA-256 commitment to 32 uniform secret bytes."""
    return hashlib.sha256(b"fedpeft self mask\x00" + bound_to + secret).digest()
