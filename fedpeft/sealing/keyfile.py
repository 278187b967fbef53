"""A private identity on disk: one JSON file of mode 600, encrypted if the site wants it.

The key comes from scrypt (RFC 7914), the encryption is AES-256-GCM (NIST SP
800-38D) with all other fields authenticated. Both a passphrase and a key file go
through scrypt: whether a key file was chosen at random cannot be seen from here.
The bytes are specified in docs/spec/sealed-update.md. Must not know messages.
"""

import base64
import binascii
import hashlib
import json
import os
import secrets
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from fedpeft.config.keys import KeySettings
from fedpeft.errors import KeyLocked, SealingError, StorageError
from fedpeft.sealing.identity import SEED_BYTES, Identity
from fedpeft.storage import explained, write_once

SCHEMA: Final = 1
KIND: Final = "fedpeft-identity"
PLAIN: Final = "none"
ENCRYPTED: Final = "scrypt-aes-256-gcm"
LEAST_PASSPHRASE: Final = 8
KEY_FILE_BYTES: Final = range(16, 64 * 1024 + 1)
FILE_LIMIT: Final = 4096
"""Bytes; an identity file has less than 700."""

COST: Final = 2**17
"""scrypt's n: 128 MiB and about 0.3 s for one try on a core of 2024."""
COSTS: Final = tuple(2**power for power in range(14, 19))
"""What is read. More would let a planted file fill the memory before it is refused."""
_R, _P, _KEY, _SALT, _NONCE, _TAG = 8, 1, 32, 16, 12, 16

_COMMON: Final = {"schema": int, "kind": str, "encryption": str, "public": str}
_FIELDS: Final[Mapping[str, Mapping[str, type]]] = {
    PLAIN: {**_COMMON, "seeds": str, "check": str},
    ENCRYPTED: {**_COMMON, "n": int, "r": int, "p": int, "salt": str, "nonce": str, "sealed": str},
}


@dataclass(frozen=True, slots=True)
class Protection:
    """How a private identity is encrypted at rest; made by one of the three class methods."""

    secret: bytes | None = field(repr=False)
    """What the encryption key is derived from; None: the file is not encrypted."""
    source: str
    """Where the secret comes from, for messages."""

    @classmethod
    def none(cls) -> Self:
        """Not encrypted: whoever reads the disk has the identity."""
        return cls(None, "no encryption")

    @classmethod
    def passphrase(cls, text: str) -> Self:
        """Encrypted with a passphrase, in Unicode's form NFC so that every keyboard gives the same.

        Raises:
            KeyLocked: it is too short, or not text.
        """
        normal = unicodedata.normalize("NFC", text)
        if len(normal) < LEAST_PASSPHRASE:
            raise KeyLocked(
                f"the passphrase is shorter than {LEAST_PASSPHRASE} characters: use a longer one, "
                "such as four random words"
            )
        try:
            return cls(normal.encode(), "the passphrase")
        except UnicodeEncodeError:
            raise KeyLocked("the passphrase is not valid UTF-8 text: type it again") from None

    @classmethod
    def key_file(cls, path: Path, *, named: str = "--key-file") -> Self:
        """Encrypted with the content of a file, every byte of it.

        ``named`` says where a person gave the path, for messages.

        Raises:
            KeyLocked: the file is missing, unreadable, or of an unfit size.
        """
        try:
            with path.open("rb") as file:
                content = file.read(KEY_FILE_BYTES.stop)
        except OSError as error:
            reason = (error.strerror or type(error).__name__).lower()
            raise KeyLocked(
                f"cannot read the key file {path}: {reason}; is its stick plugged in, and is the "
                f"path right that {named} gives?"
            ) from None
        if len(content) not in KEY_FILE_BYTES:
            raise KeyLocked(
                f"the key file {path} must have {KEY_FILE_BYTES[0]} to {KEY_FILE_BYTES[-1]} "
                "bytes: make one of 32 random bytes if nothing is encrypted with it yet, or "
                f"correct the path that {named} gives"
            )
        return cls(content, f"the key file {path}")


def protection_from(
    settings: KeySettings,
    directory: Path,
    ask: Callable[[], str],
    *,
    named: str = "key_file in the [keys] table, or --key-file,",
) -> Protection:
    """Return what the ``[keys]`` table says; ``ask`` is called only for a passphrase.

    Args:
        settings: the table.
        directory: where the configuration file lies; a relative ``key_file`` counts from it.
        ask: returns the passphrase, see :func:`fedpeft.console.ask_passphrase`.
        named: where a person gave the path of the key file, for messages.

    Raises:
        KeyLocked: there is no usable passphrase or key file.
    """
    if settings.passphrase:
        return Protection.passphrase(ask())
    if settings.key_file is not None:
        return Protection.key_file(directory / settings.key_file, named=named)
    return Protection.none()


def save_identity(identity: Identity, path: Path, protection: Protection) -> None:
    """Write ``identity`` to a new file of mode 600; its directory must exist.

    Raises:
        StorageError: the file exists, or cannot be written.
    """
    data = _to_bytes(identity, protection)
    try:
        with explained("write", path):
            write_once(path, data, mode=0o600)
    except StorageError as error:
        if isinstance(error.__cause__, FileExistsError):
            raise StorageError(
                f"{path} exists and is kept, as what was sealed for it could not be read any "
                "more: move it to a safe place if a new identity is wanted"
            ) from None
        raise


def load_identity(path: Path, protection: Protection) -> Identity:
    """Read what :func:`save_identity` wrote; takes about 0.3 s if it is encrypted.

    Raises:
        StorageError: the file is missing, or other users of the machine can read it.
        KeyLocked: the secret is missing or wrong, or the file is not encrypted although
            a secret was named.
        SealingError: the file is damaged, or of another release.
    """
    content = _parse(_read(path), path)
    encrypted = content["encryption"] == ENCRYPTED
    if encrypted and protection.secret is None:
        raise KeyLocked(
            f"{path} is encrypted and no secret was named: set passphrase or key_file in the "
            "[keys] table, or give the command --passphrase or --key-file if it has them"
        )
    if not encrypted and protection.secret is not None:
        raise KeyLocked(
            f"{path} is not encrypted although {protection.source} was named for it, so it may "
            "have been exchanged: find out why before you use it, and only if it is the right one "
            "take the setting out of the [keys] table, or leave the option out"
        )
    if protection.secret is None:
        seeds = _decoded(content["seeds"], SEED_BYTES, path)
        # The public identity does not tell all: ML-KEM's z and five bits of X25519 are not in it.
        if hashlib.sha256(seeds).hexdigest() != content["check"]:
            raise _damaged(path)
    else:
        seeds = _unlocked(content, protection.secret, protection.source, path)
    identity = Identity(seeds)
    if identity.public.digest.hex() != content["public"]:
        raise _damaged(path)
    return identity


def _to_bytes(identity: Identity, protection: Protection) -> bytes:
    common = {"schema": SCHEMA, "kind": KIND, "public": identity.public.digest.hex()}
    if protection.secret is None:
        check = hashlib.sha256(identity.seeds).hexdigest()
        seeds = _text(identity.seeds)
        return _json({**common, "encryption": PLAIN, "seeds": seeds, "check": check})
    salt, nonce = secrets.token_bytes(_SALT), secrets.token_bytes(_NONCE)
    header = {
        **common,
        "encryption": ENCRYPTED,
        "n": COST,
        "r": _R,
        "p": _P,
        "salt": _text(salt),
        "nonce": _text(nonce),
    }
    key = _derive(protection.secret, salt, COST)
    sealed = AESGCM(key).encrypt(nonce, identity.seeds, _json(header))
    return _json({**header, "sealed": _text(sealed)})


def _unlocked(content: dict[str, Any], secret: bytes, source: str, path: Path) -> bytes:
    """Return the seeds of an encrypted file."""
    if content["n"] not in COSTS or (content["r"], content["p"]) != (_R, _P):
        raise _damaged(path)
    salt = _decoded(content["salt"], _SALT, path)
    nonce = _decoded(content["nonce"], _NONCE, path)
    sealed = _decoded(content["sealed"], SEED_BYTES + _TAG, path)
    header = {name: value for name, value in content.items() if name != "sealed"}
    try:
        key = _derive(secret, salt, content["n"])
        return AESGCM(key).decrypt(nonce, sealed, _json(header))
    except InvalidTag:
        raise KeyLocked(
            f"{path} does not open with {source}: try again with the right one; if it is the "
            "right one, the file was damaged: restore it from the backup"
        ) from None


def _derive(secret: bytes, salt: bytes, cost: int) -> bytes:
    return Scrypt(salt=salt, length=_KEY, n=cost, r=_R, p=_P).derive(secret)


def _read(path: Path) -> bytes:
    """Return the bytes of a file that only its owner can read."""
    with explained("read the private identity", path), path.open("rb") as file:
        # Of the open file: another one may stand at this path a moment later.
        if os.fstat(file.fileno()).st_mode & 0o077:
            raise StorageError(
                f"{path} can be read by other users of this machine: run `chmod 600 {path}`"
            )
        return file.read(FILE_LIMIT + 1)


def _parse(data: bytes, path: Path) -> dict[str, Any]:
    """Return the fields of an identity file, each of its type; the bytes are the one encoding."""
    try:
        content: Any = json.loads(data) if len(data) <= FILE_LIMIT else None
    except (ValueError, RecursionError):
        raise _damaged(path) from None
    if not isinstance(content, dict) or content.get("kind") != KIND:
        raise _damaged(path)
    schema = content.get("schema")
    if type(schema) is int and schema != SCHEMA:
        raise SealingError(
            f"{path} has the identity format {schema}, this release reads {SCHEMA}: install the "
            "release that wrote it"
        )
    encryption = content.get("encryption")
    fields = _FIELDS.get(encryption) if isinstance(encryption, str) else None
    if fields is None or {name: type(value) for name, value in content.items()} != fields:
        raise _damaged(path)
    if _json(content) != data:
        raise _damaged(path)
    return content


def _json(content: Mapping[str, Any]) -> bytes:
    """Return the one encoding of an identity file's fields."""
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _decoded(text: str, length: int, path: Path) -> bytes:
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise _damaged(path) from None
    # Base64 has spare bits and lenient readers: what is not the one encoding is damage.
    if len(data) != length or _text(data) != text:
        raise _damaged(path)
    return data


def _damaged(path: Path) -> SealingError:
    return SealingError(
        f"{path} is no identity file of this release, or damaged: restore it from the backup"
    )
