"""FedSA-LoRA: A is shared, B stays with each clinic (Guo et al. 2025, arXiv:2410.01463).

Clinics train both factors and send A only, so each has an adapter of its own. The global
adapter's B is never changed.
"""

from typing import Literal

from fedpeft.adapters import AdapterState, WeightedMean
from fedpeft_strategies.declaration import Declaration
from fedpeft_strategies.strategy import Aggregated, Fold, Strategy


class FedSa(Strategy):
    """Weighted mean of the changes of A; O(1) adapters in memory.

    Distributed noise does not protect it: a clinic's next change of A depends on its own B,
    on which there is only that clinic's share of the noise.
    """

    declaration = Declaration(
        name="fedsa",
        what="mean of A; every clinic keeps a B of its own",
        source="FedSA-LoRA, arXiv:2410.01463",
        exact="no",
        linear=True,
        up="rk",
        down="rk",
        personal=True,
        mechanisms=frozenset({"local", "central"}),
    )

    def sends(self, number: int) -> Literal["A"]:
        """Return ``"A"``."""
        return "A"

    def fold(self, number: int, adapter: AdapterState) -> Fold:
        """Begin the mean of the changes of A."""
        return _FedSaFold(adapter)


class _FedSaFold(Fold):
    def __init__(self, adapter: AdapterState) -> None:
        self._adapter = adapter
        self._mean = WeightedMean(adapter.schema.part("A"))

    def add(self, change: AdapterState, weight: float) -> None:
        self._mean.add(change, weight)

    def result(self) -> Aggregated:
        mean = self._adapter.part("A").plus(self._mean.result())
        return Aggregated(adapter=self._adapter.with_part(mean))
