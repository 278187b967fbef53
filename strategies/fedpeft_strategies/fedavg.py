"""FedAvg over the factors A and B (McMahan et al. 2017, arXiv:1602.05629; FedIT, arXiv:2305.05644).

The next adapter is the last one plus the mean of the clinics' changes, weighted
by their training rows. A and B are averaged separately, which is not the mean of
the products BA: the error is Σ p_i (B_i − B̄)(A_i − Ā), and a round tells its size.
"""

from fedpeft.adapters import AdapterState, WeightedMean
from fedpeft_strategies.declaration import Declaration
from fedpeft_strategies.product_error import ProductError
from fedpeft_strategies.strategy import Aggregated, Fold, Strategy


class FedAvg(Strategy):
    """Weighted mean of the changes of both factors; O(1) adapters in memory."""

    declaration = Declaration(
        name="fedavg",
        what="mean of A and mean of B, each by itself",
        source="McMahan et al. 2017, arXiv:1602.05629; FedIT, arXiv:2305.05644",
        exact="no",
        linear=True,
        up="P",
        down="P",
        mechanisms=frozenset({"local", "distributed", "central"}),
    )

    def fold(self, number: int, adapter: AdapterState) -> Fold:
        """Begin the mean of the changes."""
        return FedAvgFold(adapter)


class FedAvgFold(Fold):
    """One round's mean, and unless ``measured=False`` the error of its product.

    The error is not known of a single change: it may be the sum of many clinics' changes.
    """

    def __init__(self, adapter: AdapterState, *, measured: bool = True) -> None:
        self._adapter = adapter
        self._mean = WeightedMean(adapter.schema)
        self._measured = measured
        self._first: tuple[AdapterState, float] | None = None
        self._error: ProductError | None = None

    def add(self, change: AdapterState, weight: float) -> None:
        """Fold in one change of both factors."""
        self._mean.add(change, weight)
        if self._error is not None:
            self._error.add(change, weight)
        elif self._first is not None:
            self._error = ProductError(self._adapter)
            self._error.add(*self._first)
            self._error.add(change, weight)
            self._first = None
        elif self._measured:
            self._first = change, weight

    def result(self) -> Aggregated:
        """Return the adapter plus the mean change."""
        adapter = self._adapter.plus(self._mean.result())
        return Aggregated(
            adapter=adapter, product_error=self._error.of(adapter) if self._error else None
        )
