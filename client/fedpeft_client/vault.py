"""Files that only this box can read: encrypted under a key that follows from its identity.

HKDF-SHA-256 (RFC 5869) and AES-256-GCM (NIST SP 800-38D). As safe as ``identity.key``: whoever
has that file and its passphrase opens them. Must not know what is in them. Specified in
docs/spec/checkpoint.md.
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
_KEY_BYTES: Final = 32
_NONCE_BYTES: Final = 12
_PRIVATE_FILE: Final = 0o600
_PRIVATE_FOLDER: Final = 0o700


class Vault:
    """Writes and reads files in ``directory`` for the holder of ``identity``.

    The name of a file is authenticated with its content: one cannot pass for another.
    """

    def __init__(self, directory: Path, identity: Identity) -> None:
        key = HKDF(algorithm=SHA256(), length=_KEY_BYTES, salt=None, info=_INFO)
        self._cipher = AESGCM(key.derive(identity.seeds))
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
        write_atomically(path, self._locked(name, nonce, content), mode=_PRIVATE_FILE)

    def read(self, name: str) -> bytes:
        """Return the content of the file ``name``.

        Raises:
            StorageError: it cannot be read, is damaged, or was written for another identity.
        """
        path = self.directory / name
        with explained("read", path):
            data = path.read_bytes()
        body = len(MAGIC) + _NONCE_BYTES
        if data[: len(MAGIC)] != MAGIC:
            raise StorageError(f"{path} is no file of this box, or of another release")
        try:
            return self._cipher.decrypt(data[len(MAGIC) : body], data[body:], _bound(name))
        except (InvalidTag, ValueError):
            raise StorageError(f"{path} is damaged, or was written for another identity") from None

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

    def _locked(self, name: str, nonce: bytes, content: bytes) -> bytes:
        return MAGIC + nonce + self._cipher.encrypt(nonce, content, _bound(name))


def _bound(name: str) -> bytes:
    return MAGIC + name.encode()
