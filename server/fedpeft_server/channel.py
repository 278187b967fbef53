"""Sealed questions and answers: the only way by which this server talks to clinics.

What Flower is handed is ciphertext. An answer counts only if the clinic that was
asked signed it, for exactly this question.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from flwr.app import Array, Message

from fedpeft.adapters.wire import HEADER_BYTES
from fedpeft.protocol import Payload, carried, carry
from fedpeft.sealing import SERVER, Context, Identity, clinic_role, open_sealed, seal
from fedpeft_server.exchange import exchange
from fedpeft_server.link import Link

Accept = Callable[[str, Payload], None]
"""Takes what a clinic answered; raises a FedpeftError if it cannot be used."""
_SLACK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Letter:
    """What one clinic is asked; ``broadcast`` is one ciphertext for many (see its module)."""

    payload: Payload
    broadcast: Array | None = None


class Channel:
    """Asks the clinics of one link, signing as ``identity``.

    ``schema`` is the adapter schema's hash, ``values`` its count of coordinates.
    """

    def __init__(
        self, link: Link, identity: Identity, *, federation: str, schema: str, values: int
    ) -> None:
        self._link = link
        self._identity = identity
        self._federation = federation
        self._schema = schema
        # No coordinate takes more than four bytes, sealed or masked.
        self._max_bytes = HEADER_BYTES + 4 * values + _SLACK_BYTES

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

        Returns:
            The reasons of the clinics whose answer was not accepted, by name.
        """
        names, identities = self._link.names(), self._link.identities()
        nodes = {name: node for node, name in names.items()}

        def context(node: int) -> Context:
            return Context(
                federation=self._federation,
                run=self._link.run_id,
                round=number,
                attempt=attempt,
                sender=SERVER,
                receiver=clinic_role(names[node]),
                purpose=message_type,
                schema=self._schema,
            )

        def sealed() -> Iterator[Message]:
            for node, letter in sorted(letters.items()):
                data = letter.payload.to_bytes()
                message = seal(
                    data, context(node), sender=self._identity, receiver=identities[node]
                )
                yield Message(carry(message, letter.broadcast), node, message_type)

        def take(name: str, reply: Message) -> None:
            source = f"clinic {name}"
            message, _ = carried(reply.content, source=source)
            data = open_sealed(
                message,
                context(nodes[name]).answer(),
                sender=identities[nodes[name]],
                receiver=self._identity,
                max_bytes=self._max_bytes,
            )
            accept(name, Payload.from_bytes(data, source=source))

        return exchange(self._link, sealed(), letters, timeout_s=timeout_s, take=take)
