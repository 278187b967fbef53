"""What every aggregation algorithm is to the round loop.

A strategy says which factors clinics train and send in a round, and folds their changes
into the next adapter one after the other, as they arrive. It knows nothing of messages,
clinics' names, encryption or files. Changes were checked before: they are finite and of
the part that was asked for.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from fedpeft.adapters import AdapterSchema, AdapterState, Factors, Mixing
from fedpeft.config import StrategySettings
from fedpeft.errors import AdapterError
from fedpeft_strategies.declaration import Declaration, RankRule


@dataclass(frozen=True, kw_only=True)
class Aggregated:
    """What a round of updates became.

    ``adapter`` is the next one. ``mixing``, if given, is how its factor ``mixing.factor``
    follows from that of the adapter before, so that it need not be sent. ``increment`` is
    a product BA of any rank that from now on belongs to the base model, before the scale
    alpha/rank of the federation's adapter. ``product_error`` is the distance of the next
    product from the mean of the products, as a part of the latter's norm; None: not known.
    """

    adapter: AdapterState
    mixing: Mixing | None = None
    increment: AdapterState | None = None
    product_error: float | None = None


class Fold(ABC):
    """The updates of one round, one after the other."""

    @abstractmethod
    def add(self, change: AdapterState, weight: float) -> None:
        """Fold in what one clinic changed, or the mean of what many did.

        ``change`` has the part of the schema that :meth:`Strategy.sends` names, at the
        clinic's rank; ``weight`` > 0 is its training rows, or those of all together.

        Raises:
            AdapterError: the weight or the part cannot be used.
        """

    @abstractmethod
    def result(self) -> Aggregated:
        """Return what the updates became.

        Raises:
            AdapterError: there were too few.
        """


class Strategy(ABC):
    """One aggregation algorithm over adapters of one schema."""

    declaration: ClassVar[Declaration]

    def __init__(self, schema: AdapterSchema, settings: StrategySettings) -> None:
        self.schema = schema
        self.settings = settings

    @property
    def ranks(self) -> RankRule:
        """How clinics of a lower rank take part."""
        return self.declaration.ranks

    def start(self, adapter: AdapterState) -> AdapterState:
        """Return the adapter to begin with, from LoRA's usual start (B = 0)."""
        return adapter

    def trains(self, number: int) -> Factors:
        """Return which factors clinics train in round ``number`` (from 1)."""
        return "AB"

    def sends(self, number: int) -> Factors:
        """Return which of those leave the clinic; it keeps the others as its own."""
        return self.trains(number)

    @abstractmethod
    def fold(self, number: int, adapter: AdapterState) -> Fold:
        """Begin round ``number``, in which all clinics start from ``adapter``.

        A round that is repeated begins anew: nothing of a strategy may change before
        :meth:`Fold.result`.
        """

    def memory(self) -> dict[str, torch.Tensor]:
        """Return what the strategy must not forget between two rounds, beside the adapter."""
        return {}

    def recall(self, memory: Mapping[str, torch.Tensor]) -> None:
        """Go on with what :meth:`memory` returned after the last finished round.

        Raises:
            AdapterError: it is not this strategy's.
        """
        if memory:
            raise AdapterError(
                f"strategy {self.declaration.name!r} keeps nothing between rounds, and the run "
                "holds such a thing; start the run in another directory"
            )
