"""One stock adapter in place of a changed base model and an adapter on it."""

from collections.abc import Sequence

from fedpeft.adapters.product import full_rank, stacked, truncated
from fedpeft.adapters.state import AdapterState
from fedpeft.config import AdapterSettings


def combined(adapter: AdapterState, increments: Sequence[AdapterState]) -> AdapterState:
    """Return the adapter that does on the unchanged base what ``adapter`` does on the changed one.

    ``increments`` are the products BA that were added to the base, at the adapter's scale.
    The rank is the sum of all ranks, or what the widest module can have at most.
    """
    if not increments:
        return adapter
    whole = stacked([(adapter, 1.0), *((one, 1.0) for one in increments)])
    most = full_rank(whole)
    return truncated(whole, most) if whole.schema.rank > most else whole


def at_rank(settings: AdapterSettings, rank: int) -> AdapterSettings:
    """Return the settings of another rank with the same scale alpha/rank."""
    if rank == settings.rank:
        return settings
    alpha = settings.alpha * rank / settings.rank
    return settings.model_copy(update={"rank": rank, "alpha": alpha})
