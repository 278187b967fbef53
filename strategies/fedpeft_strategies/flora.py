"""FLoRA: all clinics' factors stand beside each other (Wang et al. 2024, arXiv:2409.05976).

Σ p_i·B_i·A_i is the product of [p_1·B_1, …] and [A_1; …]. It is added to the base model's
weights and every round starts with a fresh adapter, whose product is zero. Clinics may
have any ranks.
"""

from fedpeft.adapters import AdapterState, initial_state, stacked
from fedpeft_strategies.declaration import Declaration
from fedpeft_strategies.gathered import Gathered
from fedpeft_strategies.strategy import Aggregated, Fold, Strategy

_SEED = 2409_05976


class Flora(Strategy):
    """The mean product, stacked; O(n) adapters in memory and in what is sent."""

    declaration = Declaration(
        name="flora",
        what="mean of the products BA goes into the base, then a fresh adapter",
        source="FLoRA, arXiv:2409.05976",
        exact="yes",
        linear=False,
        up="P",
        down="nP + rk",
        ranks="stacked",
        changes_base=True,
    )

    def fold(self, number: int, adapter: AdapterState) -> Fold:
        """Begin to gather the clinics' adapters."""
        return _FloraFold(number, adapter)


class _FloraFold(Fold):
    def __init__(self, number: int, adapter: AdapterState) -> None:
        self._schema, self._seed = adapter.schema, _SEED + number
        self._gathered = Gathered(adapter)

    def add(self, change: AdapterState, weight: float) -> None:
        self._gathered.add(change, weight)

    def result(self) -> Aggregated:
        increment = stacked(self._gathered.adapters())
        return Aggregated(adapter=initial_state(self._schema, self._seed), increment=increment)
