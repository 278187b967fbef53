"""The versions of the adapter that a box keeps, and which one of them is in use.

    adapters/round-7/     one version (see version.py); its files never change
    adapters/index.json   what is in use, and the rest of index.py
    adapters/.lock        held while anything here is changed
    adapter               a link to the one in use, for all who look for the adapter there

A version appears by one rename and the index is replaced whole, so that a crash at any
moment leaves a store that can be read. What a killed process left half written begins
with a dot and is removed by the next change. Knows nothing of jobs, losses or engines.
"""

import contextlib
import logging
import shutil
from collections.abc import Generator
from pathlib import Path

from fedpeft.errors import AdapterError, UnknownAdapter
from fedpeft.storage import explained, write_atomically
from fedpeft_client.folder_lock import locked
from fedpeft_client.inference.catalogue import BASE, Catalogue
from fedpeft_client.settings import StoreSettings
from fedpeft_client.versions.acceptance import Verdict
from fedpeft_client.versions.index import Index, read_index, write_index
from fedpeft_client.versions.link import AdapterLink
from fedpeft_client.versions.staging import HALF, delete, half_in, move
from fedpeft_client.versions.version import (
    LINEAGE_FILE,
    STOCK,
    WEIGHTS_FILE,
    Arrival,
    Version,
    about_arrival,
    digests_in,
    identity_of,
    read_version,
    write_about,
)

_LOG = logging.getLogger(__name__)


class AdapterStore:
    """The versions in ``directory``; beside it lies the link ``adapter``.

    Several processes may use the same store at once. Everything raises ``StorageError``
    where the store cannot be read or written.
    """

    def __init__(self, directory: Path, quota: StoreSettings = StoreSettings()) -> None:  # noqa: B008  (frozen)
        self.directory = directory
        self._link = AdapterLink(directory)
        self._quota = quota

    @property
    def link(self) -> Path:
        """Where all who look for the adapter in use find it."""
        return self._link.path

    def versions(self) -> list[Version]:
        """Return the versions, the oldest first; one that cannot be read is left out.

        :meth:`damaged` names those.
        """
        given = list(self._index().given)
        place = {name: at for at, name in enumerate(given)}
        found: list[Version] = []
        for path in self._folders().values():
            with contextlib.suppress(AdapterError):
                found.append(read_version(path))
        return sorted(found, key=lambda one: (place.get(one.name, len(given)), one.name))

    def damaged(self) -> dict[str, str]:
        """Return what is wrong with versions whose files were changed, by their names."""
        wrong: dict[str, str] = {}
        for name, path in self._folders().items():
            try:
                read_version(path).require_intact()
            except AdapterError as error:
                wrong[name] = str(error)
        return wrong

    def find(self, name: str | None = None) -> Version:
        """Return a version by its name, with its files checked; None: the one in use.

        Raises:
            UnknownAdapter: there is none of that name, or none is in use.
            AdapterError: its files were changed.
        """
        found = self.in_use() if name is None else self._named(name)
        if found is None:
            raise UnknownAdapter(
                "no adapter is in use on this box, only the base model: take part in a round, or "
                "choose one of `fedpeft-client adapters list` with `fedpeft-client adapters use`"
            )
        return found.require_intact()

    def in_use(self) -> Version | None:
        """Return the version in use; None: the base model, without an adapter.

        Raises:
            UnknownAdapter: its folder is gone.
            AdapterError: its description is damaged.
        """
        name = self.in_use_name()
        return None if name == BASE else self._named(name)

    def in_use_name(self) -> str:
        """Return the name of the version in use, also if it is damaged, or ``base``."""
        return self._index().in_use

    def pinned(self) -> list[str]:
        """Return the names of the versions that are never removed."""
        return self._index().pinned

    def catalogue(self) -> Catalogue:
        """Return what an engine has to know. A damaged version is left out, and logged.

        Raises:
            AdapterError: the one in use is damaged.
        """
        default = self.in_use()
        if default is not None:
            default.require_intact()
        wrong = self.damaged()
        for text in wrong.values():
            _LOG.error("%s", text)
        adapters = {one.name: one.path for one in self.versions() if one.name not in wrong}
        return Catalogue(default=default and default.name, adapters=adapters)

    def keep(self, arrival: Arrival, verdict: Verdict) -> Version:
        """Store an adapter, take it into use if the verdict says so, and keep to the quota.

        It is not taken into use if people chose another one than the verdict's rival
        while it was judged. The same adapter of the same round is stored once.
        """
        with self._changing() as index:
            if verdict.accepted and index.in_use != verdict.rival:
                reason = (
                    f"{index.in_use} was chosen here while it was compared with {verdict.rival}"
                )
                verdict = verdict.model_copy(update={"accepted": False, "reason": reason})
            version = self._place(index, arrival, verdict)
            if version.verdict.accepted:
                index.put_to_use(version.name)
            self._write(index)
            self._prune(index, version.name)
        return version

    def use(self, name: str) -> None:
        """Take a version into use, or the base model without an adapter (``base``).

        Raises:
            UnknownAdapter: there is none of that name.
            AdapterError: it is damaged.
        """
        with self._changing() as index:
            if name != BASE:
                self._named(name).require_intact()
            index.put_to_use(name)
            self._write(index)

    def rollback(self) -> str:
        """Take into use what was in use before, and return its name; again goes further back.

        Raises:
            UnknownAdapter: nothing was in use before.
            AdapterError: it is damaged.
        """
        with self._changing() as index:
            if len(index.history) < 2:
                raise UnknownAdapter(
                    f"nothing was in use on this box before {index.in_use}, so there is nothing "
                    "to go back to; choose one of `fedpeft-client adapters list`"
                )
            name = index.history[-2]
            if name != BASE:
                self._named(name).require_intact()
            index.history = index.history[:-1]
            self._write(index)
        return name

    def pin(self, name: str) -> None:
        """Keep a version whatever the quota.

        Raises:
            UnknownAdapter: there is none of that name.
        """
        with self._changing() as index:
            self._folder(name)
            index.pinned = sorted({*index.pinned, name})
            self._write(index)

    def unpin(self, name: str) -> None:
        """Let a version go when the quota asks for it.

        Raises:
            UnknownAdapter: there is none of that name.
        """
        with self._changing() as index:
            self._folder(name)
            index.pinned = [one for one in index.pinned if one != name]
            self._write(index)

    def remove(self, name: str) -> None:
        """Remove a version; one in use only if it is damaged.

        Raises:
            UnknownAdapter: there is none of that name.
            AdapterError: it is in use or pinned.
        """
        with self._changing() as index:
            self._folder(name)
            if name == index.in_use and name not in self.damaged():
                raise AdapterError(
                    f"the adapter {name} is in use, so it is not removed; use another one first: "
                    "fedpeft-client adapters use"
                )
            if name in index.pinned:
                raise AdapterError(
                    f"the adapter {name} is pinned, so it is not removed; unpin it first: "
                    f"fedpeft-client adapters unpin {name}"
                )
            self._drop(index, name)

    def _index(self) -> Index:
        self._link.adopt_earlier()
        return read_index(self.directory)

    def _write(self, index: Index) -> None:
        write_index(self.directory, index)
        self._link.point(index.in_use)

    def _folders(self) -> dict[str, Path]:
        """Return the folders of versions by their names."""
        self._link.adopt_earlier()
        with explained("read", self.directory):
            found = list(self.directory.iterdir()) if self.directory.is_dir() else []
        return {path.name: path for path in found if path.is_dir() and path.name[0] != "."}

    def _folder(self, name: str) -> Path:
        folders = self._folders()
        if name not in folders:
            if not folders:
                raise UnknownAdapter(
                    f"no round has arrived on this box yet, so it has no adapter {name!r}: take "
                    "part in a round first"
                )
            raise UnknownAdapter(
                f"this box has no adapter {name!r}; it has {', '.join([BASE, *sorted(folders)])}"
            )
        return folders[name]

    def _named(self, name: str) -> Version:
        return read_version(self._folder(name))

    @contextlib.contextmanager
    def _changing(self) -> Generator[Index]:
        """Exclude other processes, tidy up what a killed one left, and yield the index."""
        self._link.adopt_earlier()
        with locked(self.directory):
            index = read_index(self.directory)
            for path in self.directory.iterdir():
                if path.name.startswith((HALF, ".index.json.")):
                    delete(path)
            for version in self.versions():
                index.given.setdefault(version.name, version.identity)
            self._link.point(index.in_use)
            yield index

    def _place(self, index: Index, arrival: Arrival, verdict: Verdict) -> Version:
        """Write an adapter, and give it its name and place."""
        # Imported here: who only looks at versions needs no torch.
        from fedpeft.adapters import save_adapter

        half = half_in(self.directory)
        try:
            stock = half / STOCK
            save_adapter(arrival.state, arrival.settings, stock, base_name=arrival.base_name)
            if arrival.lineage is not None:
                write_atomically(stock / LINEAGE_FILE, arrival.lineage)
            files = digests_in(stock)
            name = _name(index, arrival, files[WEIGHTS_FILE])
            about = about_arrival(arrival, name, files, verdict)
            final = self.directory / about.name
            present = self._present(final)
            if present is not None and about.name == index.in_use:
                return present
            write_about(half, about)
            if final.exists():
                move(final, half_in(self.directory))
            move(half, final)
        finally:
            shutil.rmtree(half, ignore_errors=True)
        found = read_version(final)
        index.given.setdefault(found.name, found.identity)
        return found

    @staticmethod
    def _present(path: Path) -> Version | None:
        """Return the version in ``path`` if it is there and intact."""
        try:
            return read_version(path).require_intact()
        except AdapterError:
            return None

    def _prune(self, index: Index, arrived: str) -> None:
        """Remove the oldest versions until the rest is within the quota.

        What is in use always stays, and what was used before it, to go back to.
        """
        kept = {arrived, *index.history[-2:], *index.pinned}
        left = {version.name: version.size_bytes for version in self.versions()}
        for name, size in list(left.items()):
            within = sum(left.values()) <= self._quota.max_mb << 20
            if within and len(left) <= self._quota.max_versions:
                return
            if name not in kept:
                del left[name]
                self._drop(index, name)
                _LOG.info(
                    "removed the adapter %s (%.1f MiB): [adapters] in client.toml keeps %d "
                    "versions and %d MiB",
                    name,
                    size / 2**20,
                    self._quota.max_versions,
                    self._quota.max_mb,
                )

    def _drop(self, index: Index, name: str) -> None:
        index.forget(name)
        self._write(index)
        half = half_in(self.directory)
        move(self.directory / name, half)
        delete(half)


def _name(index: Index, arrival: Arrival, digest: str) -> str:
    """Return the name that this version has, or one that no other version ever had."""
    identity = identity_of(arrival.run, arrival.round, digest)
    for name, owner in index.given.items():
        if owner == identity:
            return name
    short = f"round-{arrival.round}"
    names = (short, f"{short}-{arrival.run[:8]}", f"{short}-{arrival.run[:8]}-{digest[:16]}")
    return next(name for name in names if name not in index.given)
