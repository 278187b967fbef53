"""FlexLoRA: the mean of the products, cut to the rank (Bai et al. 2024, arXiv:2402.11505).

A clinic of rank r_i trains the first r_i columns alone. The server takes the mean
Σ p_i·B_i·A_i and cuts it to the adapter's rank by an SVD, so that the first columns are
the best adapter of each lower rank. It needs single updates: a product is not linear in
its factors.
"""

from fedpeft.adapters import AdapterState, product_norm, stacked, truncated
from fedpeft_strategies.declaration import Declaration
from fedpeft_strategies.gathered import Gathered
from fedpeft_strategies.strategy import Aggregated, Fold, Strategy


class FlexLora(Strategy):
    """SVD of the mean product; O(n) adapters in memory, as a cut on the way would not be exact."""

    declaration = Declaration(
        name="flexlora",
        what="mean of the products BA, cut to the rank by an SVD",
        source="FlexLoRA, arXiv:2402.11505",
        exact="to rank r",
        linear=False,
        up="P",
        down="P",
        ranks="truncated",
    )

    def fold(self, number: int, adapter: AdapterState) -> Fold:
        """Begin to gather the clinics' adapters."""
        return _FlexLoraFold(adapter)


class _FlexLoraFold(Fold):
    def __init__(self, adapter: AdapterState) -> None:
        self._rank = adapter.schema.rank
        self._gathered = Gathered(adapter)

    def add(self, change: AdapterState, weight: float) -> None:
        self._gathered.add(change, weight)

    def result(self) -> Aggregated:
        mean = stacked(self._gathered.adapters())
        adapter = truncated(mean, self._rank)
        length = product_norm(mean)
        lost = product_norm(stacked([(mean, 1.0), (adapter, -1.0)]))
        return Aggregated(adapter=adapter, product_error=lost / length if length else None)
