"""All strategies by name, in the order of the table, and how one is built."""

from fedpeft.adapters import AdapterSchema
from fedpeft.config import FederationSettings
from fedpeft_strategies import possible
from fedpeft_strategies.alternating import Alternating
from fedpeft_strategies.declaration import Declaration
from fedpeft_strategies.fedavg import FedAvg
from fedpeft_strategies.fedex import FedEx
from fedpeft_strategies.fedsa import FedSa
from fedpeft_strategies.ffa import Ffa
from fedpeft_strategies.flexlora import FlexLora
from fedpeft_strategies.flora import Flora
from fedpeft_strategies.median import Median
from fedpeft_strategies.multi_krum import MultiKrum
from fedpeft_strategies.norm_bound import NormBound
from fedpeft_strategies.optimised import FedAdagrad, FedAdam, FedAvgM, FedYogi
from fedpeft_strategies.proximal import FedProx
from fedpeft_strategies.strategy import Strategy
from fedpeft_strategies.trimmed_mean import TrimmedMean

_ALL: tuple[type[Strategy], ...] = (
    FedAvg,
    Alternating,
    Ffa,
    FlexLora,
    FedEx,
    Flora,
    FedSa,
    FedProx,
    FedAvgM,
    FedAdam,
    FedYogi,
    FedAdagrad,
    Median,
    TrimmedMean,
    MultiKrum,
    NormBound,
)
STRATEGIES = {strategy.declaration.name: strategy for strategy in _ALL}


def declarations() -> list[Declaration]:
    """Return what every strategy needs and gives."""
    return [strategy.declaration for strategy in _ALL]


def require_possible(settings: FederationSettings) -> Declaration:
    """Return what the chosen strategy, around what it wraps, needs and gives.

    Raises:
        ConfigError: it is unknown, or cannot be run under these settings.
    """
    return possible.require_possible(settings, {each.name: each for each in declarations()})


def build_strategy(settings: FederationSettings, schema: AdapterSchema) -> Strategy:
    """Return the strategy that a configuration names.

    Raises:
        ConfigError: it is unknown, or cannot be run under these settings.
    """
    require_possible(settings)
    return STRATEGIES[settings.strategy.name](schema, settings.strategy)
