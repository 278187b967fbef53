"""The clinic of a running client, which notices that an identity was renewed.

The server's, which the old one of the server has signed; and the clinic's own, which
``fedpeft-client rotate --identity`` renews beside the running client.
"""

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

from fedpeft.errors import FedpeftError, WrongSignature
from fedpeft.sealing.identity import Identity
from fedpeft.sealing.keyfile import Protection, load_identity
from fedpeft_client.box import Box
from fedpeft_client.keys.key_life import identity_in_progress
from fedpeft_client.keys.renewal import follow_server
from fedpeft_client.link.connection import Event
from fedpeft_client.rounds.clinic import Clinic

_LOG: Final = logging.getLogger(__name__)
_Stamp = tuple[int, int]


class LiveClinic:
    """A box's clinic with its identity unlocked; the threads of a connection may share it.

    Remembers ``protection``, and with it a passphrase, for the identity that may come.
    """

    def __init__(self, box: Box, protection: Protection) -> None:
        """Read the box.

        Raises:
            KeyLocked: the passphrase or key file is wrong.
            SealingError, StorageError: an identity cannot be read.
        """
        self._box = box
        self._protection = protection
        self._lock = threading.Lock()
        self._stamps = self._present_stamps()
        self._identity = load_identity(box.identity_path, protection)
        self._before: tuple[Identity, ...] = ()
        self._next = self._identity_to_come()
        self._clinic = self._made()
        self._told: list[Callable[[Clinic], None]] = []

    @property
    def present(self) -> Clinic:
        """The clinic with the identity that is on the disk now.

        What is sealed for the one before still opens, until this program ends.
        """
        with self._lock:
            self._notice()
            return self._clinic

    def when_renewed(self, tell: Callable[[Clinic], None]) -> None:
        """Call ``tell`` with the clinic after its own identity was renewed."""
        self._told.append(tell)

    def heard(self, event: Event) -> None:
        """Look whether an identity was renewed, also the server's when it may have been.

        A server that cannot be followed is told by its messages not opening.
        """
        with self._lock:
            self._notice()
        if event.kind != "connected" and event.detail != WrongSignature.reason:
            return
        try:
            found = follow_server(self._box)
        except FedpeftError as error:
            _LOG.warning("%s", error)
            return
        if found is not None:
            with self._lock:
                self._clinic = self._made()
            _LOG.warning(
                "the server's identity was renewed, as the old one has signed; its fingerprint "
                "is now %s",
                found.fingerprint,
            )

    def _notice(self) -> None:
        """Take up what ``rotate --identity`` has done to the box, once for each change."""
        stamps = self._present_stamps()
        if stamps == self._stamps:
            return
        self._stamps = stamps
        try:
            found = load_identity(self._box.identity_path, self._protection)
            self._next = self._identity_to_come()
        except FedpeftError as error:
            _LOG.warning("the identity of this box was renewed, and is not used yet: %s", error)
            return
        renewed = found.public != self._identity.public
        if renewed:
            self._before, self._identity = (self._identity,), found
        self._clinic = self._made()
        if renewed:
            _LOG.warning(
                "this box's identity was renewed; its fingerprint is now %s",
                found.public.fingerprint,
            )
            for tell in self._told:
                tell(self._clinic)

    def _identity_to_come(self) -> tuple[Identity, ...]:
        path = identity_in_progress(self._box.identity_path)
        return (load_identity(path, self._protection),) if path.exists() else ()

    def _made(self) -> Clinic:
        return self._box.clinic(self._identity, (*self._next, *self._before))

    def _present_stamps(self) -> list[_Stamp]:
        path = self._box.identity_path
        return [_stamp(path), _stamp(identity_in_progress(path))]


def _stamp(path: Path) -> _Stamp:
    """Return numbers that change when the file does."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return 0, 0
    return status.st_ino, status.st_mtime_ns
