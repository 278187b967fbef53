"""Strategies by name."""

from flwr.serverapp.strategy import Strategy

from fedpeft.adapters import AdapterSchema
from fedpeft.errors import ConfigError
from fedpeft_strategies.fedavg import FedAvg

_STRATEGIES = {FedAvg.name: FedAvg}


def build_strategy(name: str, schema: AdapterSchema) -> Strategy:
    """Return the strategy that a configuration names.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in _STRATEGIES:
        known = ", ".join(sorted(_STRATEGIES))
        raise ConfigError(f"strategy.name = {name!r} is unknown; the strategies are {known}")
    return _STRATEGIES[name](schema)
