"""The last adapter that each clinic in this process was sent, so that only changes need come.

In memory: a box that was started anew is sent the whole adapter once. With a stick, where
each message is another process, it is kept on the disk (see ``sticks/memory.py``).
"""

from fedpeft.protocol.parcel import Held, opened
from fedpeft.protocol.payload import ADAPTER
from fedpeft_client.rounds.clinic import Clinic
from fedpeft_client.rounds.mailbox import Request


class Shelf:
    """What clinics hold, by their names. Clinics that hold the same share it."""

    def __init__(self) -> None:
        self._held: dict[str, Held] = {}

    def take(self, clinic: Clinic, request: Request) -> Held:
        """Return the adapter that a request is about, and keep it.

        Raises:
            AdapterNotHeld: it came as a change of something that the clinic does not hold.
            SealingError: it is damaged, or not the one that the server signed.
        """
        digest = request.payload.text(ADAPTER, source="the server")
        held = self._alike(digest)
        if held is None:
            held = opened(request.parcel(), self._held.get(clinic.name), digest)
        if self._held.get(clinic.name) is not held:
            self._keep(clinic, held)
        return held

    def _keep(self, clinic: Clinic, held: Held) -> None:
        self._held[clinic.name] = held

    def _alike(self, digest: str) -> Held | None:
        """Return what another clinic of this process was sent already."""
        return next((held for held in self._held.values() if held.digest == digest), None)
