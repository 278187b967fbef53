"""Sealed questions and answers: the only way by which this server talks to clinics.

What Flower is handed is ciphertext. An answer counts only if the clinic that was
asked signed it, for exactly this question.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from flwr.app import Array, Message

from fedpeft.adapters.wire import HEADER_BYTES
from fedpeft.errors import FedpeftError, Interrupted
from fedpeft.protocol import Payload, carried, carry
from fedpeft.protocol.successions import Links
from fedpeft.sealing import (
    SERVER,
    Context,
    Identity,
    PublicIdentity,
    clinic_role,
    open_sealed,
    seal,
)
from fedpeft_server.link.link import Link
from fedpeft_server.rounds.asking import Asking
from fedpeft_server.rounds.exchange import exchange

Accept = Callable[[str, Payload], None]
"""Takes what a clinic answered; raises a FedpeftError if it cannot be used."""
_SLACK_BYTES = 1 << 20
_MOST_AGAIN = 5
"""How often one step is asked again of clinics that could not answer for a passing reason."""


@dataclass(frozen=True, slots=True)
class Letter:
    """What one clinic is asked; ``broadcast`` is one ciphertext for many (see its module)."""

    payload: Payload
    broadcast: Array | None = None


class Channel:
    """Asks the clinics of one link, signing as ``identity``.

    ``schema`` is the adapter schema's hash, ``values`` its count of coordinates, ``asking``
    knows the questions that a clinic may still answer.
    """

    def __init__(
        self,
        link: Link,
        identity: Identity,
        *,
        federation: str,
        schema: str,
        values: int,
        asking: Asking | None = None,
    ) -> None:
        self._link = link
        self._identity = identity
        self._federation = federation
        self._schema = schema
        self._asking = asking or Asking()
        # No coordinate takes more than four bytes, sealed or masked.
        self._max_bytes = HEADER_BYTES + 4 * values + _SLACK_BYTES
        self._asked: dict[str, PublicIdentity] = {}

    @property
    def run_id(self) -> int:
        """Flower's id of the run, which every message is bound to."""
        return self._link.run_id

    def names(self) -> dict[int, str]:
        """Return the clinics' names by node id."""
        return self._link.names()

    def signing_keys(self) -> dict[str, bytes]:
        """Return the pinned Ed25519 keys (32 bytes) of the enrolled clinics by name."""
        names = self._link.names()
        identities = self._link.identities()
        return {names[node]: each.signing_bytes for node, each in identities.items()}

    def key_asked(self, name: str) -> bytes:
        """Return the Ed25519 key of the identity that a clinic was last asked under.

        Not the present one, where the clinic has renewed its identity since.
        """
        return self._asked[name].signing_bytes

    def successions(self) -> Links:
        """Return how clinics came to their identities, where they had others before."""
        return self._link.successions()

    def ask(
        self,
        message_type: str,
        number: int,
        attempt: int,
        letters: Mapping[int, Letter],
        *,
        timeout_s: float,
        accept: Accept,
    ) -> dict[str, str]:
        """Send each node its letter for round ``number`` and hand the answers to ``accept``.

        A clinic is asked again within the time if its identity was renewed meanwhile, so that it
        could not open what was sealed for the old one, or if its program was killed and another
        one has taken its place.

        Returns:
            The reasons of the clinics whose answer was not accepted, by name.
        """
        ends, identities = time.monotonic() + timeout_s, self._link.identities()
        names = self._link.names()

        def asked(to: Mapping[int, Letter], time_left_s: float) -> dict[str, str]:
            self._asked |= {names[node]: identities[node] for node in to}
            return self._ask(
                message_type, number, attempt, to, timeout_s=time_left_s, accept=accept
            )

        failed = asked(letters, timeout_s)
        for _ in range(_MOST_AGAIN):
            identities, before = self._link.identities(), identities
            again = {
                node: letter
                for node, letter in letters.items()
                if failed.get(names[node]) == Interrupted.reason
                or (names[node] in failed and identities.get(node, before[node]) != before[node])
            }
            if not again or (left := ends - time.monotonic()) <= 0:
                break
            for node in again:
                del failed[names[node]]
            failed |= asked(again, left)
        return dict(sorted(failed.items()))

    def _ask(
        self,
        message_type: str,
        number: int,
        attempt: int,
        letters: Mapping[int, Letter],
        *,
        timeout_s: float,
        accept: Accept,
    ) -> dict[str, str]:
        """Ask once; each clinic under the identity that :meth:`ask` noted for it."""
        names = self._link.names()
        nodes = {name: node for node, name in names.items()}

        def placed(node: int) -> Context:
            fresh = Context(
                federation=self._federation,
                run=self._link.run_id,
                round=number,
                attempt=attempt,
                sender=SERVER,
                receiver=clinic_role(names[node]),
                purpose=message_type,
                schema=self._schema,
            )
            return self._asking.place(names[node], fresh, letters[node].payload)

        places = {node: placed(node) for node in letters}

        def sealed() -> Iterator[Message]:
            for node, letter in sorted(letters.items()):
                data = letter.payload.to_bytes()
                receiver = self._asked[names[node]]
                message = seal(data, places[node], sender=self._identity, receiver=receiver)
                yield Message(carry(message, letter.broadcast), node, message_type)

        def take(name: str, reply: Message) -> None:
            source, place = f"clinic {name}", places[nodes[name]]
            message, _ = carried(reply.content, source=source)
            try:
                data = open_sealed(
                    message,
                    place.answer(),
                    sender=self._asked[name],
                    receiver=self._identity,
                    max_bytes=self._max_bytes,
                )
                accept(name, Payload.from_bytes(data, source=source))
            except FedpeftError:
                self._asking.unusable(name, place)
                raise

        return exchange(self._link, sealed(), letters, timeout_s=timeout_s, take=take)
