"""Opens what the server sealed for a clinic, and seals the clinic's answers.

Everything that a clinic does begins with a message that opened here: signed by the
pinned server, for this clinic, federation, run, round and purpose.
"""

from dataclasses import dataclass, replace

from flwr.app import Message

from fedpeft.errors import SealingError, WrongContext
from fedpeft.protocol import CONTENT_KEY, KINDS, Payload, carried, carry
from fedpeft.sealing import (
    SERVER,
    ContentKey,
    Context,
    clinic_role,
    open_broadcast,
    open_sealed,
    read_context,
    seal,
)
from fedpeft_client.rounds.clinic import Clinic

_SOURCE = "the server"
_MAX_BYTES = 64 << 20
"""Of one sealed part; adapters travel in the broadcast, which the connection bounds."""


@dataclass(frozen=True, slots=True)
class Request:
    """A message of the server that has opened; ``broadcast`` is still encrypted.

    ``clinic`` has the identity that it was sealed for, which is not the present one while that
    is being renewed: the server awaits an answer under the same.
    """

    message: Message
    context: Context
    payload: Payload
    broadcast: bytes | None
    clinic: Clinic

    def parcel(self) -> bytes:
        """Return what brings the adapter; empty if nothing came with the message.

        Raises:
            SealingError: it is not what the server signed.
        """
        if self.broadcast is None:
            return b""
        text = self.payload.text(CONTENT_KEY, source=_SOURCE)
        try:
            key = ContentKey.from_bytes(bytes.fromhex(text))
        except ValueError:
            raise SealingError("the key of a broadcast is damaged: it is not used") from None
        return open_broadcast(self.broadcast, key)


Place = tuple[int, int, int]
"""How far a run has come: round, kind and attempt."""


class Places:
    """How far each run of each clinic in this process has come."""

    def __init__(self) -> None:
        self._latest: dict[tuple[str, int], Place] = {}

    def latest(self, clinic: Clinic, run: int) -> Place | None:
        """Return the place of the latest message that opened; None: there was none."""
        return self._latest.get((clinic.name, run))

    def advance(self, clinic: Clinic, run: int, place: Place) -> None:
        """Remember that a message of ``place`` has opened."""
        self._latest[clinic.name, run] = place


class Mailbox:
    """Opens and seals for clinics; remembers how far each run has come, against replays."""

    def __init__(self, places: Places | None = None) -> None:
        self._places = places or Places()

    def open(self, clinic: Clinic, message: Message) -> Request:
        """Return the server's message.

        Raises:
            SealingError: it is not sealed, damaged, forged, or meant for another place.
            WrongContext: so too if it is older than what this run has come to.
        """
        sealed, broadcast = carried(message.content, source=_SOURCE)
        claimed = read_context(sealed)
        expected = Context(
            federation=clinic.federation,
            run=message.metadata.run_id,
            round=claimed.round,
            attempt=claimed.attempt,
            sender=SERVER,
            receiver=clinic_role(clinic.name),
            purpose=message.metadata.message_type,
            schema=claimed.schema,
        )
        data, addressed = _opened(clinic, sealed, expected)
        self._require_not_older(clinic, expected)
        payload = Payload.from_bytes(data, source=_SOURCE)
        return Request(message, expected, payload, broadcast, addressed)

    def answer(self, request: Request, payload: Payload) -> Message:
        """Return the answer to a request, sealed by the identity that was asked."""
        membership = request.clinic.membership
        sealed = seal(
            payload.to_bytes(),
            request.context.answer(),
            sender=membership.identity,
            receiver=membership.server,
        )
        return Message(carry(sealed), reply_to=request.message)

    def _require_not_older(self, clinic: Clinic, context: Context) -> None:
        kind = KINDS.index(context.purpose.split(".")[0])
        place = (context.round, kind, context.attempt)
        latest = self._places.latest(clinic, context.run)
        if latest is not None and place < latest:
            raise WrongContext(
                f"a message of the server for round {context.round} came after a later one: it is "
                "an old message sent again and is not used"
            )
        if place != latest:
            self._places.advance(clinic, context.run, place)


def _opened(clinic: Clinic, sealed: bytes, expected: Context) -> tuple[bytes, Clinic]:
    """Return what was sealed for one of the clinic's identities, and the clinic under that.

    Raises:
        SealingError: it opens with none of them; says why it does not with the present one.
    """
    present = clinic.membership
    refused: SealingError | None = None
    for identity in (present.identity, *present.others):
        try:
            data = open_sealed(
                sealed, expected, sender=present.server, receiver=identity, max_bytes=_MAX_BYTES
            )
        except SealingError as error:
            refused = refused or error
            continue
        membership = replace(present, identity=identity)
        return data, replace(clinic, membership=membership) if refused else clinic
    raise refused or SealingError("this clinic has no identity")
