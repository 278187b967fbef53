"""Who somebody is: a key to sign with and a key to be written to.

Signatures are Ed25519 (RFC 8032). Sealing is HPKE (RFC 9180) with the hybrid KEM
of X25519 and ML-KEM-768 (FIPS 203), so that traffic recorded today stays closed
to a quantum computer of tomorrow. Must not know files or messages.
"""

import base64
import binascii
import hashlib
import secrets
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final, Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import MLKEM768X25519PrivateKey, MLKEM768X25519PublicKey

from fedpeft.errors import SealingError, WrongSignature

KEY_BYTES: Final = 32
"""Of an Ed25519 or X25519 key, private or public."""
SIGNATURE_BYTES: Final = 64
_VERSION: Final = b"\x01"
_ED25519, _X25519, _MLKEM_SEED, _MLKEM_PUBLIC = KEY_BYTES, KEY_BYTES, 64, 1184
PUBLIC_BYTES: Final = len(_VERSION) + _ED25519 + _X25519 + _MLKEM_PUBLIC
SEED_BYTES: Final = _ED25519 + _X25519 + _MLKEM_SEED
_FIELD: Final = 2**255 - 19
_ORDER_8: Final = 0x05FC536D880238B13933C6D305ACDFD5F098EFF289F4C345B027B2C28F95E826
_WEAK: Final = frozenset({0, 1, _ORDER_8, _FIELD - _ORDER_8, _FIELD - 1, _FIELD, _FIELD + 1})
"""y of the Ed25519 points of small order: under such a key anybody can forge signatures
(Chalkias, Garillot, Nikolaenko 2020, "Taming the many EdDSAs", section 3)."""


@dataclass(frozen=True)
class PublicIdentity:
    """The public half: 1249 bytes, version 1, Ed25519, X25519 and ML-KEM-768 keys in this order.

    Raises:
        SealingError: the bytes are no public identity of this version.
    """

    data: bytes

    def __post_init__(self) -> None:
        if len(self.data) != PUBLIC_BYTES or self.data[:1] != _VERSION:
            raise _not_an_identity()
        if int.from_bytes(self.signing_bytes, "little") % 2**255 in _WEAK:
            raise _not_an_identity()
        try:
            # An unusable key fails here, not when somebody writes to its holder.
            _ = self.sealing_key
        except ValueError:
            raise _not_an_identity() from None

    @cached_property
    def sealing_key(self) -> MLKEM768X25519PublicKey:
        """The HPKE public key."""
        mlkem = MLKEM768PublicKey.from_public_bytes(self.data[-_MLKEM_PUBLIC:])
        return MLKEM768X25519PublicKey(mlkem, self._x25519)

    @cached_property
    def signing_bytes(self) -> bytes:
        """The Ed25519 public key, 32 bytes."""
        return self.data[len(_VERSION) : len(_VERSION) + _ED25519]

    @cached_property
    def _x25519(self) -> X25519PublicKey:
        at = len(_VERSION) + _ED25519
        return usable_x25519(self.data[at : at + _X25519])

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the identity, 32 bytes."""
        return hashlib.sha256(self.data).digest()

    @property
    def fingerprint(self) -> str:
        """The :func:`fingerprint` of the identity, to compare by telephone."""
        return fingerprint(self.data)

    def verify(self, signature: bytes, message: bytes, *, source: str) -> None:
        """Check that the holder of this identity signed ``message``.

        Raises:
            WrongSignature: it did not.
        """
        verify(self.signing_bytes, signature, message, source=source)

    def to_text(self) -> str:
        """Return the identity as URL-safe base64."""
        return base64.urlsafe_b64encode(self.data).decode("ascii")

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Read what :meth:`to_text` wrote.

        Raises:
            SealingError: it is something else.
        """
        try:
            data = base64.b64decode(text.encode("ascii"), altchars=b"-_", validate=True)
        except (binascii.Error, UnicodeEncodeError):
            raise _not_an_identity() from None
        identity = cls(data)
        # Base64 has spare bits and lenient readers: an identity has one text only.
        if identity.to_text() != text:
            raise _not_an_identity()
        return identity

    def __getstate__(self) -> dict[str, bytes]:
        # The key objects cannot be pickled, and follow from the bytes.
        return {"data": self.data}


@dataclass(frozen=True)
class Identity:
    """The private half: 128 secret bytes from which both keys follow; never shown by ``repr``.

    Raises:
        SealingError: the seeds have another length.
    """

    seeds: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.seeds) != SEED_BYTES:
            raise SealingError("the private identity is damaged: restore it from the backup")

    @classmethod
    def generate(cls) -> Self:
        """Return a new identity from the system's randomness."""
        return cls(secrets.token_bytes(SEED_BYTES))

    @cached_property
    def public(self) -> PublicIdentity:
        """The public half."""
        return PublicIdentity(
            _VERSION
            + self._signing_key.public_key().public_bytes_raw()
            + self._x25519.public_key().public_bytes_raw()
            + self._mlkem.public_key().public_bytes_raw()
        )

    @cached_property
    def sealing_key(self) -> MLKEM768X25519PrivateKey:
        """The HPKE private key."""
        return MLKEM768X25519PrivateKey(self._mlkem, self._x25519)

    def sign(self, message: bytes) -> bytes:
        """Return the Ed25519 signature of ``message``, 64 bytes."""
        return self._signing_key.sign(message)

    @cached_property
    def _signing_key(self) -> Ed25519PrivateKey:
        return Ed25519PrivateKey.from_private_bytes(self.seeds[:_ED25519])

    @cached_property
    def _x25519(self) -> X25519PrivateKey:
        return X25519PrivateKey.from_private_bytes(self.seeds[_ED25519 : _ED25519 + _X25519])

    @cached_property
    def _mlkem(self) -> MLKEM768PrivateKey:
        return MLKEM768PrivateKey.from_seed_bytes(self.seeds[_ED25519 + _X25519 :])

    def __getstate__(self) -> dict[str, bytes]:
        # The key objects cannot be pickled, and follow from the seeds.
        return {"seeds": self.seeds}


def fingerprint(data: bytes) -> str:
    """Return the first 16 bytes of the SHA-256 of ``data`` as ``ab12-cd34-...``."""
    text = hashlib.sha256(data).hexdigest()[:32]
    return "-".join(text[at : at + 4] for at in range(0, len(text), 4))


def usable_x25519(public: bytes) -> X25519PublicKey:
    """Return an X25519 public key, unless its secrets with all others are the same zeros.

    Raises:
        ValueError: it is such a key, one of small order, or has not ``KEY_BYTES`` bytes.
    """
    key = X25519PublicKey.from_public_bytes(public)
    _PROBE.exchange(key)
    return key


def verify(signing_bytes: bytes, signature: bytes, message: bytes, *, source: str) -> None:
    """Check an Ed25519 signature under a public key of 32 bytes.

    Raises:
        WrongSignature: it is not of this key and message.
    """
    try:
        Ed25519PublicKey.from_public_bytes(signing_bytes).verify(signature, message)
    except (InvalidSignature, ValueError):
        raise WrongSignature(
            f"what came from {source} was not signed with the key that was agreed for it: it is "
            "not used; if its keys were renewed on purpose, it has to enrol again"
        ) from None


_PROBE: Final = X25519PrivateKey.from_private_bytes(bytes(_X25519))
"""Any private key serves: the product with a point of small order is zero for all of them."""


def _not_an_identity() -> SealingError:
    return SealingError(
        "what should be a public identity is none of this release: "
        "install the same fedpeft release on both sides"
    )
