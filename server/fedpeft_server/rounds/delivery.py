"""Brings every clinic the adapter of a round: the whole of it once, and from then on changes.

Remembers what each clinic has shown that it holds, by an answer. A clinic that lost it says
so and is asked again with the whole. Each parcel is encrypted once, however many get it.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from fedpeft.adapters import Mixing
from fedpeft.errors import AdapterNotHeld
from fedpeft.protocol import ADAPTER, CONTENT_KEY, JOB, Job, Payload, raw
from fedpeft.protocol.lineage import LINEAGE, SignedLineage
from fedpeft.protocol.parcel import Held, change, whole
from fedpeft.sealing import seal_broadcast
from fedpeft_server.rounds.channel import Accept, Channel, Letter


@dataclass(frozen=True)
class Order:
    """What all clinics are asked: a job on an adapter.

    ``mixing`` may say how the adapter follows from the one before, and ``lineage`` is the
    signed file on what made it, to be kept beside it; None: it is not to be kept.
    """

    job: Job
    held: Held
    mixing: Mixing | None = None
    lineage: SignedLineage | None = None


class Delivery:
    """What the clinics of one run hold."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._held: dict[str, str] = {}
        self._latest: Held | None = None

    def ask(
        self,
        purpose: str,
        number: int,
        attempt: int,
        order: Order,
        nodes: Collection[int],
        *,
        timeout_s: float,
        accept: Accept,
    ) -> dict[str, str]:
        """Send each of ``nodes`` the order, see :meth:`Channel.ask`.

        Returns:
            The reasons of the clinics whose answer was not accepted, by name.
        """
        names = self._channel.names()
        digest = order.held.digest

        def taken(name: str, payload: Payload) -> None:
            self._held[name] = digest
            accept(name, payload)

        def sent(to: Collection[int]) -> dict[str, str]:
            letters = self._letters(order, {node: names[node] for node in to})
            return self._channel.ask(
                purpose, number, attempt, letters, timeout_s=timeout_s, accept=taken
            )

        failed = sent(nodes)
        lost = [node for node in nodes if failed.get(names[node]) == AdapterNotHeld.reason]
        if lost:
            for node in lost:
                self._held.pop(names[node], None)
                del failed[names[node]]
            failed |= sent(lost)
        self._latest = order.held
        return dict(sorted(failed.items()))

    def _letters(self, order: Order, clinics: Mapping[int, str]) -> dict[int, Letter]:
        """Return the letters by node; clinics that hold the same get the same parcel."""
        fields = {JOB: order.job.to_json(), ADAPTER: order.held.digest}
        if order.lineage is not None:
            fields[LINEAGE] = order.lineage.to_bytes().decode()
        printed: dict[str, Letter] = {}
        letters: dict[int, Letter] = {}
        for node, name in clinics.items():
            basis = self._held.get(name, "")
            if basis not in printed:
                printed[basis] = _printed(fields, self._parcel(basis, order))
            letters[node] = printed[basis]
        return letters

    def _parcel(self, basis: str, order: Order) -> bytes:
        if basis == order.held.digest:
            return b""
        if self._latest is not None and basis == self._latest.digest:
            return change(self._latest, order.held, order.mixing) or whole(order.held)
        return whole(order.held)


def _printed(fields: Mapping[str, str], parcel: bytes) -> Letter:
    if not parcel:
        return Letter(Payload({**fields}))
    data, key = seal_broadcast(parcel)
    return Letter(Payload({**fields, CONTENT_KEY: key.to_bytes().hex()}), raw(data))
