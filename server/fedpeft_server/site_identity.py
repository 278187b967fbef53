"""The site's identity on disk: the private half locked if the site wants it, the public half open.

Invitations need the public half only, so they can be written without a passphrase.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from fedpeft.config import KeySettings
from fedpeft.errors import SealingError, StorageError
from fedpeft.sealing.identity import Identity, PublicIdentity
from fedpeft.sealing.keyfile import Protection, load_identity, protection_from, save_identity
from fedpeft.sealing.public_file import load_public_identity, public_line
from fedpeft.storage import explained, write_once


@dataclass(frozen=True)
class SiteIdentity:
    """A site's two identity files, and the public half that was read."""

    directory: Path
    public: PublicIdentity

    @classmethod
    def create(cls, directory: Path, protection: Protection) -> Self:
        """Make a new identity in ``directory``, which exists.

        Raises:
            StorageError: there is one already, or the directory cannot be written.
        """
        identity = Identity.generate()
        save_identity(identity, _private(directory), protection)
        path = _public(directory)
        with explained("write", path):
            write_once(path, public_line(identity.public), mode=0o644)
        return cls(directory, identity.public)

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Read the public half, and make sure that the private one is there.

        Raises:
            StorageError: a file is missing or damaged.
        """
        for path in (_private(directory), _public(directory)):
            if not path.is_file():
                raise StorageError(
                    f"{path} is missing, as it was lost or the site was made by an older release, "
                    "and clinics cannot seal to this server: restore it from the backup, or make "
                    "a new site and invite the clinics again"
                )
        path = _public(directory)
        try:
            return cls(directory, load_public_identity(path))
        except SealingError as error:
            raise StorageError(
                f"{path} is damaged or of another release: restore it from the backup"
            ) from error

    def unlock(self, keys: KeySettings, directory: Path, ask: Callable[[], str]) -> Identity:
        """Return the private half.

        Args:
            keys: the ``[keys]`` table of ``server.toml``.
            directory: where that file lies.
            ask: returns the passphrase, where there is one.

        Raises:
            KeyLocked: the passphrase or key file is missing or wrong.
            SealingError: the file is damaged.
            StorageError: other users can read it, or the two halves do not belong together.
        """
        path = _private(self.directory)
        identity = load_identity(path, protection_from(keys, directory, ask))
        if identity.public != self.public:
            raise StorageError(
                f"{path} and {_public(self.directory)} do not belong together, and clinics were "
                "invited with the second: restore both from one backup"
            )
        return identity


def _private(directory: Path) -> Path:
    return directory / "identity.key"


def _public(directory: Path) -> Path:
    return directory / "identity.pub"
