"""Opens what the server sealed for a clinic, and seals the clinic's answers.

Everything that a clinic does begins with a message that opened here: signed by the
pinned server, for this clinic, federation, run, round and purpose.
"""

from dataclasses import dataclass

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
from fedpeft_client.clinic import Clinic

_SOURCE = "the server"
_MAX_BYTES = 64 << 20
"""Of one sealed part; adapters travel in the broadcast, which the connection bounds."""


@dataclass(frozen=True, slots=True)
class Request:
    """A message of the server that has opened; ``broadcast`` is still encrypted."""

    message: Message
    context: Context
    payload: Payload
    broadcast: bytes | None

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


class Mailbox:
    """Opens and seals for clinics; remembers how far each run has come, against replays."""

    def __init__(self) -> None:
        self._latest: dict[tuple[str, int], tuple[int, int, int]] = {}

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
        membership = clinic.membership
        data = open_sealed(
            sealed,
            expected,
            sender=membership.server,
            receiver=membership.identity,
            max_bytes=_MAX_BYTES,
        )
        self._require_not_older(clinic, expected)
        return Request(message, expected, Payload.from_bytes(data, source=_SOURCE), broadcast)

    def answer(self, clinic: Clinic, request: Request, payload: Payload) -> Message:
        """Return the sealed answer to a request."""
        sealed = seal(
            payload.to_bytes(),
            request.context.answer(),
            sender=clinic.membership.identity,
            receiver=clinic.membership.server,
        )
        return Message(carry(sealed), reply_to=request.message)

    def _require_not_older(self, clinic: Clinic, context: Context) -> None:
        kind = KINDS.index(context.purpose.split(".")[0])
        place, key = (context.round, kind, context.attempt), (clinic.name, context.run)
        if place < self._latest.get(key, place):
            raise WrongContext(
                f"a message of the server for round {context.round} came after a later one: it is "
                "an old message sent again and is not used"
            )
        self._latest[key] = place
