"""Aggregation algorithms, one a file, behind Flower's ``Strategy`` hooks."""

import fedpeft as _fedpeft  # first: switches phone-home off before Flower is imported
from fedpeft_strategies.fedavg import FedAvg
from fedpeft_strategies.registry import build_strategy

__version__ = _fedpeft.__version__
__all__ = ["FedAvg", "build_strategy"]
