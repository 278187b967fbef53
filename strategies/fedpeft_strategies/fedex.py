"""FedEx-LoRA: FedAvg, and what it misses goes into the base (Singhal et al., arXiv:2410.09432).

The error of averaging A and B by themselves, Σ p_i·B_i·A_i − B̄·Ā, is added to the base
model's weights. It equals Σ p_i (B_i − B̄)(A_i − A_n), a sum over all clinics but the
last, and is computed so: its rank is no more than (n − 1)·r, and large numbers that
nearly cancel do not occur.
"""

from fedpeft.adapters import AdapterState, WeightedMean, full_rank, stacked, truncated
from fedpeft_strategies.declaration import Declaration
from fedpeft_strategies.gathered import Gathered
from fedpeft_strategies.strategy import Aggregated, Fold, Strategy


class FedEx(Strategy):
    """FedAvg with an exact product; O(n) adapters in memory and in what is sent."""

    declaration = Declaration(
        name="fedex",
        what="fedavg, and the error of its product goes into the base",
        source="FedEx-LoRA, arXiv:2410.09432",
        exact="yes",
        linear=False,
        up="P",
        down="nP",
        changes_base=True,
    )

    def fold(self, number: int, adapter: AdapterState) -> Fold:
        """Begin to gather the clinics' changes."""
        return _FedExFold(adapter)


class _FedExFold(Fold):
    def __init__(self, adapter: AdapterState) -> None:
        self._adapter = adapter
        self._mean = WeightedMean(adapter.schema)
        self._gathered = Gathered(adapter)

    def add(self, change: AdapterState, weight: float) -> None:
        # The residual's formula is for clinics that changed every column.
        self._adapter.schema.require(change.schema.hash, source="the update")
        self._gathered.add(change, weight)
        self._mean.add(change, weight)

    def result(self) -> Aggregated:
        mean = self._mean.result()
        residual = _residual(self._gathered.changes(), mean)
        return Aggregated(adapter=self._adapter.plus(mean), increment=residual)


def _residual(changes: list[tuple[AdapterState, float]], mean: AdapterState) -> AdapterState | None:
    """Return Σ p_i·B_i·A_i − B̄·Ā exactly; None of one clinic, whose product is the mean."""
    *others, (last, _) = changes
    if not others:
        return None
    deviations = [
        (change.minus(last).with_part(change.minus(mean).part("B")), share)
        for change, share in others
    ]
    residual = stacked(deviations)
    most = full_rank(residual)
    return truncated(residual, most) if most < residual.schema.rank else residual
