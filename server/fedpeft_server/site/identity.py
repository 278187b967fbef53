"""The site's identity on disk: the private half locked if the site wants it, the public half open.

Invitations need the public half only, so they can be written without a passphrase. The
statements by which identities came into each other's place lie beside it, the oldest first.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from fedpeft.config import KeySettings
from fedpeft.errors import SealingError, StorageError
from fedpeft.sealing.context import SERVER
from fedpeft.sealing.identity import Identity, PublicIdentity
from fedpeft.sealing.keyfile import Protection, load_identity, protection_from, save_identity
from fedpeft.sealing.public_file import load_public_identity, public_line
from fedpeft.sealing.succession import Succession
from fedpeft.storage import explained, sync_directory, write_atomically, write_once

KEY_FILE_SETTING: Final = "key_file in the [keys] table of server.toml"
"""Where the path of a site's key file comes from, for messages."""


@dataclass(frozen=True)
class SiteIdentity:
    """A site's identity files, and what was read: the public half, and its ``succession``."""

    directory: Path
    public: PublicIdentity
    succession: tuple[str, ...] = ()

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
            _finish_rotation(directory)
            return cls(directory, load_public_identity(path), _statements(directory))
        except (SealingError, ValueError) as error:
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
        identity = load_identity(
            path, protection_from(keys, directory, ask, named=KEY_FILE_SETTING)
        )
        if identity.public != self.public:
            raise StorageError(
                f"{path} and {_public(self.directory)} do not belong together, and clinics were "
                "invited with the second: restore both from one backup"
            )
        return identity

    def rotate(self, old: Identity, protection: Protection, federation: str) -> Self:
        """Put a new identity in the place of ``old``, which signs that it is its successor.

        A crash leaves the old identity or the new one; the next :meth:`load` goes on.

        Args:
            old: the private half, from :meth:`unlock`.
            protection: how the new one is encrypted.
            federation: its name.

        Raises:
            StorageError: the directory cannot be written.
        """
        new = Identity.generate()
        statement = Succession.sign(old, new, federation=federation, holder=SERVER)
        _next(self.directory).unlink(missing_ok=True)
        save_identity(new, _next(self.directory), protection)
        # This is the moment: from here on the new identity is the site's.
        lines = "".join(f"{line}\n" for line in (*self.succession, statement.to_json()))
        write_atomically(_succession(self.directory), lines.encode("ascii"))
        return type(self).load(self.directory)


def _finish_rotation(directory: Path) -> None:
    """Put the identity in its place that the last statement names, if that is still to do."""
    statements = _statements(directory)
    if not statements or not _next(directory).is_file():
        return
    new = Succession.from_json(statements[-1]).new
    with explained("read", _next(directory)):
        # The file says in the clear whose it is; one that nothing was signed for is left over.
        begun = json.loads(_next(directory).read_bytes()).get("public")
    if begun != new.digest.hex():
        return
    write_atomically(_public(directory), public_line(new))
    with explained("write", _private(directory)):
        _next(directory).replace(_private(directory))
        sync_directory(directory)


def _statements(directory: Path) -> tuple[str, ...]:
    try:
        return tuple(_succession(directory).read_text("ascii").splitlines())
    except FileNotFoundError:
        return ()


def _next(directory: Path) -> Path:
    return directory / "identity.next.key"


def _succession(directory: Path) -> Path:
    return directory / "succession.jsonl"


def _private(directory: Path) -> Path:
    return directory / "identity.key"


def _public(directory: Path) -> Path:
    return directory / "identity.pub"
