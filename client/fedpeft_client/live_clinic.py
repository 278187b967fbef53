"""The clinic of a running client, which notices that the server's identity was renewed."""

import logging
from typing import Final

from fedpeft.errors import FedpeftError, WrongSignature
from fedpeft.sealing.identity import Identity
from fedpeft_client.box import Box
from fedpeft_client.clinic import Clinic
from fedpeft_client.connection import Event
from fedpeft_client.renewal import follow_server

_LOG: Final = logging.getLogger(__name__)


class LiveClinic:
    """A box's clinic with ``identity`` unlocked; used by one thread."""

    def __init__(self, box: Box, identity: Identity) -> None:
        """Read the box.

        Raises:
            SealingError, StorageError: the server's identity cannot be read.
        """
        self._box = box
        self._identity = identity
        self.present: Clinic = box.clinic(identity)

    def heard(self, event: Event) -> None:
        """Follow the server when it may have been started anew, with another identity.

        A server that cannot be followed is told by its messages not opening.
        """
        if event.kind != "connected" and event.detail != WrongSignature.reason:
            return
        try:
            found = follow_server(self._box)
        except FedpeftError as error:
            _LOG.warning("%s", error)
            return
        if found is not None:
            self.present = self._box.clinic(self._identity)
            _LOG.warning(
                "the server's identity was renewed, as the old one has signed; its fingerprint "
                "is now %s",
                found.fingerprint,
            )
