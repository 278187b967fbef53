"""The adapters of one round's clinics, for strategies that no mean of changes suffices for.

Kept as changes until they are asked for; O(n) adapters in memory.
"""

import math

from fedpeft.adapters import AdapterState
from fedpeft.errors import AdapterError


class Gathered:
    """What n clinics made of one adapter, each of its own rank."""

    def __init__(self, adapter: AdapterState) -> None:
        self._adapter = adapter
        self._changes: list[tuple[AdapterState, float]] = []

    def add(self, change: AdapterState, weight: float) -> None:
        """Take in the change of both factors of one clinic, of the rank it trained.

        Raises:
            AdapterError: the weight is not a positive finite number, or there is no such rank.
            SchemaMismatch: the change is of another adapter.
        """
        if not 0 < weight < math.inf:
            raise AdapterError(f"an update's weight must be positive and finite, not {weight}")
        self._adapter.schema.part("AB", change.schema.rank).require(
            change.schema.hash, source="the update"
        )
        self._changes.append((change, weight))

    def changes(self) -> list[tuple[AdapterState, float]]:
        """Return each change and its share p_i of the weight; the shares sum to 1.

        Raises:
            AdapterError: nothing was added.
        """
        whole = sum(weight for _, weight in self._changes)
        if not whole:
            raise AdapterError("the mean of no updates is undefined")
        return [(change, weight / whole) for change, weight in self._changes]

    def adapters(self) -> list[tuple[AdapterState, float]]:
        """Return each clinic's adapter, its start plus its change, and its share p_i.

        Raises:
            AdapterError: nothing was added.
        """
        return [
            (self._adapter.part("AB", change.schema.rank).plus(change), share)
            for change, share in self.changes()
        ]
