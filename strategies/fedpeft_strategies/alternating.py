"""RoLoRA: the factors take turns (Chen et al. 2025, arXiv:2502.01755), in an orthonormal gauge.

In odd rounds all clinics train B beside the same A, in even rounds A beside the same B.
So the mean of the changed factor gives the mean of the products BA exactly, and it is
linear in what clinics send. Before each turn the factor that rests is made orthonormal,
BA unchanged: a change, and noise on it, is then as long in the product as in the factor,
in whatever direction, and the first columns are worth training alone. Knows nothing of
where changes come from.
"""

from typing import Literal

from fedpeft.adapters import AdapterSchema, AdapterState, WeightedMean, orthonormal
from fedpeft.config import StrategySettings
from fedpeft_strategies.declaration import Declaration
from fedpeft_strategies.strategy import Aggregated, Fold, Strategy


class Alternating(Strategy):
    """Odd rounds change B, even rounds A; O(1) adapters in memory.

    With ``gauge=False`` the factors stay as they were trained: for a server optimiser,
    whose moments belong to fixed coordinates.
    """

    declaration = Declaration(
        name="alternating",
        what="B in odd rounds, A in even ones, beside an orthonormal other",
        source="RoLoRA, arXiv:2502.01755",
        exact="yes",
        linear=True,
        up="P/2",
        down="P/2",
        ranks="nested",
        mechanisms=frozenset({"local", "distributed", "central"}),
    )

    def __init__(
        self, schema: AdapterSchema, settings: StrategySettings, *, gauge: bool = True
    ) -> None:
        super().__init__(schema, settings)
        self._gauge = gauge

    def start(self, adapter: AdapterState) -> AdapterState:
        """Return the adapter with orthonormal rows of A."""
        return orthonormal(adapter, "A")[0] if self._gauge else adapter

    def trains(self, number: int) -> Literal["A", "B"]:
        """Return ``"B"`` in odd rounds and ``"A"`` in even ones."""
        return "B" if number % 2 else "A"

    def fold(self, number: int, adapter: AdapterState) -> Fold:
        """Begin the mean of the changes of one factor."""
        return _AlternatingFold(self, number, adapter)

    def finished(self, number: int, adapter: AdapterState, change: AdapterState) -> Aggregated:
        """Return what a round becomes whose clinics together changed one factor by ``change``.

        Raises:
            SchemaMismatch: ``change`` is not of the factor of this round.
        """
        factor = self.trains(number)
        moved = adapter.with_part(adapter.part(factor).plus(change))
        if not self._gauge:
            return Aggregated(adapter=moved)
        turned, mixing = orthonormal(moved, factor)
        return Aggregated(adapter=turned, mixing=mixing)


class _AlternatingFold(Fold):
    """The weighted mean of one factor, each column among those who trained it."""

    def __init__(self, strategy: Alternating, number: int, adapter: AdapterState) -> None:
        self._strategy, self._number, self._adapter = strategy, number, adapter
        self._mean = WeightedMean(strategy.schema.part(strategy.trains(number)))

    def add(self, change: AdapterState, weight: float) -> None:
        self._mean.add(change, weight)

    def result(self) -> Aggregated:
        return self._strategy.finished(self._number, self._adapter, self._mean.result())
