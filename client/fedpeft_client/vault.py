"""Files that only this box can read: encrypted under a key that follows from its identity.

HKDF-SHA-256 (RFC 5869) and AES-256-GCM (NIST SP 800-38D). As safe as ``identity.key``: whoever
has that file and its passphrase opens them. When the identity is renewed, the keys of the
files that are there are passed on to it; new ones are written under its own. Must not know
what is in them. Specified in docs/spec/checkpoint.md.
"""

import secrets
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedpeft.errors import StorageError
from fedpeft.sealing import Identity
from fedpeft.storage import explained, sync_directory, write_atomically

MAGIC: Final = b"FPBOX\x00\x00\x01"
"""The last byte is the version of the format."""
LARGEST: Final = (1 << 31) - (1 << 16)
"""Bytes of a content; AES-GCM takes a little more at once."""
_INFO: Final = b"fedpeft/checkpoint/1"
_NAME_INFO: Final = b"fedpeft/checkpoint/1/name"
_KEY_BYTES: Final = 32
_NONCE_BYTES: Final = 12
_PRIVATE_FILE: Final = 0o600
_PRIVATE_FOLDER: Final = 0o700
_EARLIER: Final = "earlier-"
_EARLIER_SUFFIX: Final = ".keys"
MOST_EARLIER: Final = 8
"""Keys of identities before the present one; files of older ones are unreadable."""


class Vault:
    """Writes and reads files in ``directory`` for the holder of ``identity``.

    The name of a file is authenticated with its content: one cannot pass for another. What
    was written for an identity before this one is read too, where :func:`pass_on` passed its
    key on; that lies in the folder above.
    """

    def __init__(self, directory: Path, identity: Identity) -> None:
        self._key = _key_of(identity)
        self._earlier: tuple[bytes, ...] | None = None
        self.directory: Final = directory

    def write(self, name: str, content: bytes) -> None:
        """Replace the file ``name``, of mode 600 in a folder of mode 700, at once and durably.

        Raises:
            StorageError: the disk is full, read-only, or the folder may not be written.
        """
        path = self.directory / name
        with explained("write", path):
            self.directory.mkdir(mode=_PRIVATE_FOLDER, parents=True, exist_ok=True)
        nonce = secrets.token_bytes(_NONCE_BYTES)
        write_atomically(path, _locked(self._key, name, nonce, content), mode=_PRIVATE_FILE)

    def read(self, name: str) -> bytes:
        """Return the content of the file ``name``.

        Raises:
            StorageError: it cannot be read, is damaged, or was written for another identity.
        """
        path = self.directory / name
        with explained("read", path):
            data = path.read_bytes()
        if data[: len(MAGIC)] != MAGIC:
            raise StorageError(f"{path} is no file of this box, or of another release")
        content = _unlocked(self._key, name, data)
        if content is None:
            earlier = (_unlocked(key, name, data) for key in self._earlier_keys())
            content = next((each for each in earlier if each is not None), None)
        if content is None:
            raise StorageError(f"{path} is damaged, or was written for another identity")
        return content

    def remove(self, name: str) -> None:
        """Remove the file ``name``, so that a power cut does not bring it back.

        Raises:
            StorageError: the disk is read-only.
        """
        path = self.directory / name
        with explained("remove", path):
            path.unlink(missing_ok=True)
            sync_directory(self.directory)

    def size(self, name: str) -> int:
        """Return how many bytes the file has on the disk.

        Raises:
            StorageError: it is not there.
        """
        path = self.directory / name
        with explained("read", path):
            return path.stat().st_size

    def names(self) -> list[str]:
        """Return all that is in the folder, half-written files too, sorted.

        Raises:
            StorageError: the folder cannot be read.
        """
        with explained("read", self.directory):
            found = self.directory.iterdir() if self.directory.is_dir() else ()
            return sorted(path.name for path in found)

    def _earlier_keys(self) -> tuple[bytes, ...]:
        if self._earlier is None:
            self._earlier = _read_earlier(self.directory.parent, self._key)
        return self._earlier


def pass_on(directory: Path, before: Identity, after: Identity) -> None:
    """Let vaults in folders of ``directory`` be read by ``after`` as by ``before``.

    Writes the keys of the last ``MOST_EARLIER`` identities, encrypted for ``after``; what
    ``before`` itself was passed on stays, so that both can read.

    Raises:
        StorageError: the folder cannot be read or written.
    """
    old, new = _key_of(before), _key_of(after)
    keys = (old, *_read_earlier(directory, old))[:MOST_EARLIER]
    name = _earlier_name(new)
    data = _locked(new, name, secrets.token_bytes(_NONCE_BYTES), b"".join(keys))
    write_atomically(directory / name, data, mode=_PRIVATE_FILE)
    with explained("remove", directory):
        for path in directory.glob(f"{_EARLIER}*{_EARLIER_SUFFIX}"):
            if path.name not in (name, _earlier_name(old)):
                path.unlink(missing_ok=True)


def _read_earlier(directory: Path, key: bytes) -> tuple[bytes, ...]:
    """Return the keys that were passed on to the holder of ``key``, the newest first."""
    name = _earlier_name(key)
    path = directory / name
    with explained("read", path):
        data = path.read_bytes() if path.is_file() else b""
    content = (_unlocked(key, name, data) if data else None) or b""
    return tuple(content[at : at + _KEY_BYTES] for at in range(0, len(content), _KEY_BYTES))


def _earlier_name(key: bytes) -> str:
    """Return the name of the file for the holder of ``key``, of which it tells nothing."""
    return f"{_EARLIER}{_derived(key, _NAME_INFO)[:8].hex()}{_EARLIER_SUFFIX}"


def _key_of(identity: Identity) -> bytes:
    return _derived(identity.seeds, _INFO)


def _derived(secret: bytes, info: bytes) -> bytes:
    return HKDF(algorithm=SHA256(), length=_KEY_BYTES, salt=None, info=info).derive(secret)


def _locked(key: bytes, name: str, nonce: bytes, content: bytes) -> bytes:
    return MAGIC + nonce + AESGCM(key).encrypt(nonce, content, _bound(name))


def _unlocked(key: bytes, name: str, data: bytes) -> bytes | None:
    """Return the content of a file; None if it is damaged, or of another key or name."""
    body = len(MAGIC) + _NONCE_BYTES
    try:
        return AESGCM(key).decrypt(data[len(MAGIC) : body], data[body:], _bound(name))
    except (InvalidTag, ValueError):
        return None


def _bound(name: str) -> bytes:
    return MAGIC + name.encode()
