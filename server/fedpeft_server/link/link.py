"""What the round loop needs to know of the engine below it, besides Flower's Grid."""

from collections.abc import Mapping
from typing import Protocol

from flwr.app import Message
from flwr.serverapp import Grid

from fedpeft.sealing import PublicIdentity
from fedpeft_server.link.wire_meter import WireMeter


class Link(Protocol):
    """The engine's side of a federation."""

    @property
    def grid(self) -> Grid:
        """Flower's grid; ``get_node_ids`` gives the clinics that are connected now."""
        ...

    @property
    def meter(self) -> WireMeter:
        """What was measured on the wire so far."""
        ...

    @property
    def run_id(self) -> int:
        """Flower's id of the run."""
        ...

    def names(self) -> dict[int, str]:
        """Return the names of all enrolled clinics by node id."""
        ...

    def identities(self) -> dict[int, PublicIdentity]:
        """Return what the clinics enrolled with, by node id."""
        ...

    def successions(self) -> Mapping[str, tuple[bytes, ...]]:
        """Return by name how clinics came to their identities, where they had others before.

        Each link is in the form of ``fedpeft.sealing.succession.Link``, the oldest first.
        """
        ...

    def node_of(self, reply: Message) -> int:
        """Return the node that ``reply`` is about, also when Flower made it up itself."""
        ...
