"""A backup's bytes on disk: a header and chunks, each encrypted, or with a checksum only.

Chunks are numbered and the last one is marked (STREAM, Hoang and others 2015), so that none
can be changed, moved, left out or cut off unseen. Must not know what is inside.
"""

import base64
import binascii
import hashlib
import hmac
import io
import json
import secrets
from collections.abc import Callable
from typing import Any, BinaryIO, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from fedpeft.errors import KeyLocked, StorageError
from fedpeft.sealing.keyfile import COST, COSTS, ENCRYPTED, PLAIN, Protection

MAGIC: Final = b"FPBACKUP"
VERSION: Final = 1
CHUNK_BYTES: Final = 1 << 20
"""Of content in each chunk but the last, which has fewer, or none."""
_HEADER_LIMIT: Final = 1024
_R, _P, _KEY, _SALT, _NONCE, _LENGTH = 8, 1, 32, 16, 12, 2
_TAG: Final = {ENCRYPTED: 16, PLAIN: 32}

_Crypt = Callable[[bytes, bytes], bytes]


class ChunkWriter:
    """Writes content as chunks; :meth:`finish` makes it whole."""

    def __init__(self, target: BinaryIO, protection: Protection) -> None:
        """Write the header; takes about 0.3 s if it is encrypted."""
        about: dict[str, Any] = {"encryption": PLAIN}
        salt = secrets.token_bytes(_SALT)
        if protection.secret is not None:
            text = base64.b64encode(salt).decode("ascii")
            about = {"encryption": ENCRYPTED, "n": COST, "r": _R, "p": _P, "salt": text}
        header = _packed(about)
        target.write(header)
        self._target = target
        self._seal = _sealing(protection.secret, salt, COST, header)
        self._held = bytearray()
        self._number = 0

    def write(self, data: bytes) -> int:
        """Take in content."""
        self._held += data
        while len(self._held) > CHUNK_BYTES:
            self._put(bytes(self._held[:CHUNK_BYTES]), last=False)
            del self._held[:CHUNK_BYTES]
        return len(data)

    def finish(self) -> None:
        """Write what is left as the last chunk."""
        self._put(bytes(self._held), last=True)

    def _put(self, data: bytes, *, last: bool) -> None:
        self._target.write(self._seal(_nonce(self._number, last), data))
        self._number += 1


class ChunkReader(io.RawIOBase):
    """The content of chunks, each checked before a byte of it is handed out.

    Raises on reading:
        StorageError: a chunk was changed or is missing.
    """

    def __init__(self, source: BinaryIO, protection: Protection, name: str) -> None:
        """Read the header; takes about 0.3 s if it is encrypted.

        Raises:
            StorageError: it is no backup, damaged, or of a newer release.
            KeyLocked: the secret is missing or wrong, or there should be none.
        """
        super().__init__()
        self._source, self._name = source, name
        about, header = self._header()
        encrypted = about["encryption"] == ENCRYPTED
        if encrypted and protection.secret is None:
            raise KeyLocked(f"{name} is encrypted: name its secret with --key-file or --passphrase")
        if not encrypted and protection.secret is not None:
            raise KeyLocked(
                f"{name} is not encrypted although {protection.source} was named, so it may have "
                "been exchanged: find out why, and leave the option out only if it is the right one"
            )
        salt = _salt(about) if encrypted else b""
        self._open = _opening(protection.secret, salt, about.get("n", COST), header)
        self._sealed_bytes = CHUNK_BYTES + _TAG[about["encryption"]]
        self._secret_source = protection.source if encrypted else ""
        self._number, self._held, self._at_end = 0, b"", False

    def readable(self) -> bool:
        """Return true."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill ``buffer`` with content; 0 at the end of the whole."""
        while not self._held and not self._at_end:
            self._held = self._next()
        count = min(len(buffer), len(self._held))
        buffer[:count], self._held = self._held[:count], self._held[count:]
        return count

    def _next(self) -> bytes:
        sealed = self._source.read(self._sealed_bytes)
        # Only the last chunk is shorter, or has nothing behind it.
        whole = len(sealed) == self._sealed_bytes
        behind = self._source.read(1) if whole else b""
        if behind:
            self._source.seek(-1, io.SEEK_CUR)
        self._at_end = not behind
        try:
            data = self._open(_nonce(self._number, self._at_end), sealed)
        except (InvalidTag, ValueError):
            raise self._unopened() from None
        self._number += 1
        return data

    def _unopened(self) -> Exception:
        if not self._number and self._secret_source:
            return KeyLocked(
                f"{self._name} does not open with {self._secret_source}: try again with the right "
                "one; if it is the right one, the file is damaged: take another backup"
            )
        return StorageError(
            f"{self._name} is damaged or cut short after {self._number} MiB: take another backup"
        )

    def _header(self) -> tuple[dict[str, Any], bytes]:
        lead = self._source.read(len(MAGIC) + 2 * _LENGTH)
        magic, version = lead[: len(MAGIC)], lead[len(MAGIC) : len(MAGIC) + _LENGTH]
        if magic != MAGIC or len(lead) != len(MAGIC) + 2 * _LENGTH:
            raise StorageError(
                f"{self._name} is no backup of a site: name a file that backup wrote"
            )
        if int.from_bytes(version, "little") != VERSION:
            raise StorageError(
                f"{self._name} has the backup format {int.from_bytes(version, 'little')}, this "
                f"release reads {VERSION}: install the release that wrote it"
            )
        text = self._source.read(min(int.from_bytes(lead[-_LENGTH:], "little"), _HEADER_LIMIT))
        try:
            about = json.loads(text)
            if _packed(about) != lead + text or not _is_sound(about):
                raise ValueError
        except (ValueError, TypeError, KeyError, RecursionError):
            raise StorageError(
                f"the head of {self._name} is damaged: take another backup"
            ) from None
        return about, lead + text


def _is_sound(about: dict[str, Any]) -> bool:
    if about["encryption"] == PLAIN:
        return set(about) == {"encryption"}
    # More would let a planted file fill the memory before it is refused.
    allowed = about["n"] in COSTS and (about["r"], about["p"]) == (_R, _P)
    return about["encryption"] == ENCRYPTED and allowed and len(_salt(about)) == _SALT


def _salt(about: dict[str, Any]) -> bytes:
    try:
        return base64.b64decode(about["salt"], validate=True)
    except binascii.Error:
        raise ValueError from None


def _packed(about: dict[str, Any]) -> bytes:
    text = json.dumps(about, sort_keys=True, separators=(",", ":")).encode()
    numbers = (number.to_bytes(_LENGTH, "little") for number in (VERSION, len(text)))
    return MAGIC + b"".join(numbers) + text


def _nonce(number: int, last: bool) -> bytes:
    return number.to_bytes(_NONCE - 1, "big") + bytes([last])


def _sealing(secret: bytes | None, salt: bytes, cost: int, header: bytes) -> _Crypt:
    if secret is None:
        return lambda nonce, data: data + _checksum(header, nonce, data)
    cipher = _cipher(secret, salt, cost)
    return lambda nonce, data: cipher.encrypt(nonce, data, header)


def _opening(secret: bytes | None, salt: bytes, cost: int, header: bytes) -> _Crypt:
    if secret is None:
        return lambda nonce, sealed: _checked(header, nonce, sealed)
    cipher = _cipher(secret, salt, cost)
    return lambda nonce, sealed: cipher.decrypt(nonce, sealed, header)


def _cipher(secret: bytes, salt: bytes, cost: int) -> AESGCM:
    return AESGCM(Scrypt(salt=salt, length=_KEY, n=cost, r=_R, p=_P).derive(secret))


def _checksum(header: bytes, nonce: bytes, data: bytes) -> bytes:
    return hashlib.sha256(header + nonce + data).digest()


def _checked(header: bytes, nonce: bytes, sealed: bytes) -> bytes:
    data, found = sealed[: -_TAG[PLAIN]], sealed[-_TAG[PLAIN] :]
    if not hmac.compare_digest(_checksum(header, nonce, data), found):
        raise ValueError
    return data
