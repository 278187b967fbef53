"""Aggregation algorithms, one a file, behind one interface of ours (see ``strategy.py``)."""

import fedpeft as _fedpeft  # first: switches phone-home off before Flower is imported
from fedpeft_strategies.declaration import Declaration
from fedpeft_strategies.registry import STRATEGIES, build_strategy, declarations, require_possible
from fedpeft_strategies.strategy import Aggregated, Fold, Strategy

__version__ = _fedpeft.__version__
__all__ = [
    "STRATEGIES",
    "Aggregated",
    "Declaration",
    "Fold",
    "Strategy",
    "build_strategy",
    "declarations",
    "require_possible",
]
