"""Who the other clinics are, as this box has seen them: trust on first use.

Their signing keys come in lists from the server. A server that made clinics up,
or stood between two, would have to show other keys than before; the keys of the
first time are kept. A key that the one before has signed takes its place by itself;
about any other change a person decides.
"""

import contextlib
import json
import re
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

from fedpeft.config import NAME_PATTERN
from fedpeft.errors import EnrolmentError, StorageError, UnknownPeer
from fedpeft.file_lock import exclusive
from fedpeft.sealing.identity import KEY_BYTES, fingerprint
from fedpeft.storage import explained, write_atomically

SCHEMA: Final = 1
_NAME: Final = re.compile(NAME_PATTERN)
Follow = Callable[[str, bytes], bytes]
"""Returns the signing key that took the place of a clinic's pinned one, by the statements of
its holders; the pinned one itself where there are none. Raises WrongSignature or SealingError."""


@dataclass(frozen=True, kw_only=True)
class Met:
    """Whom a book has got to know: names pinned for the first time, and those with a new key."""

    new: tuple[str, ...] = ()
    renewed: tuple[str, ...] = ()


def _stays(_name: str, pinned: bytes) -> bytes:
    return pinned


def key_fingerprint(key: bytes) -> str:
    """Return the fingerprint of a signing key, as ``ab12-cd34-...``.

    Not the fingerprint of an identity, as other clinics are shown this key alone.
    """
    return fingerprint(key)


class PeerBook:
    """The signing keys of other clinics by name, in one file of mode 600.

    Every call reads the file afresh, so that ``fedpeft-client peers --forget``
    takes effect on a client that is running.
    """

    def __init__(self, path: Path | None, *, accept_new: bool) -> None:
        """Use the book at ``path``, which need not exist.

        Args:
            path: of the file; None: nothing outlives this object.
            accept_new: whether a clinic that was never seen is pinned, not refused.
        """
        self._path = path
        self._accept_new = accept_new
        self._in_memory: dict[str, bytes] = {}

    def admit(self, peers: Mapping[str, bytes], follow: Follow = _stays) -> Met:
        """Compare keys with those that were pinned, and pin the new ones: all or none.

        The new ones are on the disk before this returns.

        Args:
            peers: clinic name to Ed25519 public key, 32 bytes.
            follow: asked about a key that differs from the pinned one.

        Returns:
            Whose key is pinned from now on, in the order of names.

        Raises:
            UnknownPeer: a key differs from the pinned one and did not take its place, is new
                where none may be, is another clinic's, or a name or key is none.
            WrongSignature, SealingError: ``follow`` was shown a forgery.
            StorageError: the file is damaged or cannot be written.
        """
        with self._locked():
            pinned = self._read()
            for name, key in sorted(peers.items()):
                self._check(name, key, pinned, follow)
            met = Met(
                new=tuple(sorted(peers.keys() - pinned.keys())),
                renewed=tuple(
                    name for name, key in sorted(peers.items()) if pinned.get(name, key) != key
                ),
            )
            together = {**pinned, **peers}
            _require_distinct(together)
            if together != pinned:
                self._write(together)
        return met

    def known(self) -> dict[str, str]:
        """Return name and key fingerprint of all pinned clinics, by name.

        Raises:
            StorageError: the file is damaged.
        """
        return {name: key_fingerprint(key) for name, key in sorted(self._read().items())}

    def forget(self, name: str) -> None:
        """Unpin a clinic: it counts as never seen.

        Raises:
            EnrolmentError: no clinic of that name is pinned.
            StorageError: the file is damaged or cannot be written.
        """
        with self._locked():
            pinned = self._read()
            if pinned.pop(name, None) is None:
                raise EnrolmentError(
                    f"this box has pinned no clinic named {name!r}: "
                    "fedpeft-client peers DIR lists the names"
                )
            self._write(pinned)

    def _check(self, name: str, key: bytes, pinned: Mapping[str, bytes], follow: Follow) -> None:
        if not _NAME.fullmatch(name) or len(key) != KEY_BYTES:
            raise UnknownPeer(
                f"the server names a clinic {name!r:.80} whose name or key is none: the update "
                "stays here; tell the central site"
            )
        if name not in pinned and not self._accept_new:
            raise UnknownPeer(
                f"this box has never seen the clinic {name} and aggregation.new_peers is "
                f'"refuse": its fingerprint is {key_fingerprint(key)}; compare it with that '
                'clinic by telephone, and start once with "accept" if it is right'
            )
        before = pinned.get(name, key)
        # Only a chain that ends with this very key explains it: not one that goes on from it.
        if before != key and follow(name, before) != key:
            raise UnknownPeer(
                f"the key of the clinic {name} has changed since this box first saw it, from "
                f"{key_fingerprint(before)} to {key_fingerprint(key)}, and the old one has not "
                "signed that: compare fingerprints with that clinic by telephone, and if the new "
                f"one is right, run `fedpeft-client peers DIR --forget {name}`"
            )

    def _read(self) -> dict[str, bytes]:
        if self._path is None:
            return dict(self._in_memory)
        with explained("read", self._path):
            try:
                content = self._path.read_bytes()
            except FileNotFoundError:
                return {}
        return _parse(content, self._path)

    def _write(self, pinned: Mapping[str, bytes]) -> None:
        if self._path is None:
            self._in_memory = dict(pinned)
            return
        keys = {name: key.hex() for name, key in sorted(pinned.items())}
        text = json.dumps({"schema": SCHEMA, "peers": keys}, indent=2)
        write_atomically(self._path, f"{text}\n".encode("ascii"), mode=0o600)

    @contextlib.contextmanager
    def _locked(self) -> Generator[None]:
        """Keep a client that is running and a person's ``--forget`` from undoing each other."""
        if self._path is None:
            yield
            return
        # The folder, as the file itself is replaced by every change.
        with exclusive(self._path.parent):
            yield


def _require_distinct(keys: Mapping[str, bytes]) -> None:
    owners: dict[bytes, str] = {}
    for name, key in sorted(keys.items()):
        if key in owners:
            raise UnknownPeer(
                f"the server names {owners[key]} and {name} with one and the same key: the update "
                "stays here; ask both clinics by telephone, and if one of them is no more, run "
                "`fedpeft-client peers DIR --forget NAME`"
            )
        owners[key] = name


def _parse(content: bytes, path: Path) -> dict[str, bytes]:
    try:
        document: Any = json.loads(content)
        if document["schema"] != SCHEMA:
            raise ValueError
        keys = {
            name: bytes.fromhex(text)
            for name, text in cast("dict[str, str]", document["peers"]).items()
        }
        if any(not _NAME.fullmatch(name) or len(key) != KEY_BYTES for name, key in keys.items()):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise StorageError(
            f"{path} is damaged or of another release, so other clinics cannot be recognised: "
            "restore it from the backup, or delete it and compare their fingerprints anew"
        ) from None
    return keys
