"""The link ``adapter`` beside the store, which leads to the version in use.

Releases before the store had a folder in its place: the only adapter, in use. Such a
folder becomes a version of the store.
"""

from pathlib import Path
from typing import Final

from fedpeft.errors import StorageError
from fedpeft.storage import explained, sync_directory
from fedpeft_client.folder_lock import locked
from fedpeft_client.inference.catalogue import BASE
from fedpeft_client.versions.acceptance import Verdict
from fedpeft_client.versions.index import read_index, write_index
from fedpeft_client.versions.staging import half_in, move
from fedpeft_client.versions.version import (
    CONFIG_FILE,
    STOCK,
    WEIGHTS_FILE,
    about_earlier,
    digests_in,
    identity_of,
    write_about,
)

_EARLIER: Final = "earlier"
"""The name of an adapter that a release before the store received."""


class AdapterLink:
    """The link of the store in ``directory``. Raises ``StorageError`` where it cannot be used."""

    def __init__(self, directory: Path) -> None:
        self.path = directory.with_name("adapter")
        self._directory = directory

    def point(self, name: str) -> None:
        """Let the link lead to a version, or to nothing for the base model; the lock is held."""
        if self.path.exists() and not self.path.is_symlink():
            raise StorageError(
                f"{self.path} is in the way of the link to the adapter in use: move it elsewhere"
            )
        with explained("write", self.path):
            if name == BASE:
                self.path.unlink(missing_ok=True)
                return
            target = Path(self._directory.name) / name / STOCK
            if not self.path.is_symlink() or self.path.readlink() != target:
                staged = half_in(self._directory)
                staged.symlink_to(target)
                staged.replace(self.path)
                sync_directory(self.path.parent)

    def adopt_earlier(self) -> None:
        """Make the folder of a release before the store a version, in use.

        Its description and the index are written before it is moved, so that it is never
        gone; until then nothing reads them.
        """
        if not self._is_earlier():
            return
        with locked(self._directory):
            if not self._is_earlier():
                return  # another process was faster
            final, index = self._directory / _EARLIER, read_index(self._directory)
            if (final / STOCK).exists():
                raise StorageError(
                    f"{self.path} is a folder where a link to the adapter in use belongs: move it "
                    "elsewhere"
                )
            files = digests_in(self.path)
            reason = "received by a release that judged no adapters"
            verdict = Verdict(accepted=True, reason=reason, rival=BASE)
            write_about(final, about_earlier(_EARLIER, files, verdict))
            index.put_to_use(_EARLIER)
            index.given[_EARLIER] = identity_of(None, None, files[WEIGHTS_FILE])
            write_index(self._directory, index)
            move(self.path, final / STOCK)
            self.point(_EARLIER)

    def _is_earlier(self) -> bool:
        if self.path.is_symlink():
            return False
        return all((self.path / name).is_file() for name in (CONFIG_FILE, WEIGHTS_FILE))
