"""A strategy that is laid around another one and leaves to it what it does not change."""

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch

from fedpeft.adapters import AdapterSchema, AdapterState, Factors
from fedpeft.config import StrategySettings
from fedpeft.errors import ConfigError
from fedpeft_strategies.declaration import RankRule
from fedpeft_strategies.strategy import Fold, Strategy


class Wrapper(Strategy):
    """The strategy ``strategy.inner``, or the first of :attr:`around`, in all it does.

    Raises:
        ConfigError: ``strategy.inner`` is not one that it can be laid around.
    """

    around: ClassVar[Mapping[str, Callable[[AdapterSchema, StrategySettings], Strategy]]]
    """What it can be laid around, by name, the default first."""

    def __init__(self, schema: AdapterSchema, settings: StrategySettings) -> None:
        super().__init__(schema, settings)
        name = settings.inner or next(iter(self.around))
        if name not in self.around:
            raise ConfigError(
                f"strategy.inner = {name!r} cannot stand inside {self.declaration.name!r}, which "
                f"is made for a mean of factors; choose one of {', '.join(self.around)}"
            )
        self._inner = self.around[name](schema, settings)

    @property
    def ranks(self) -> RankRule:
        """How clinics of a lower rank take part in the inner strategy."""
        return self._inner.ranks

    def start(self, adapter: AdapterState) -> AdapterState:
        """Return what the inner strategy begins with."""
        return self._inner.start(adapter)

    def trains(self, number: int) -> Factors:
        """Return what the inner strategy trains."""
        return self._inner.trains(number)

    def sends(self, number: int) -> Factors:
        """Return what the inner strategy sends."""
        return self._inner.sends(number)

    def fold(self, number: int, adapter: AdapterState) -> Fold:
        """Begin the inner strategy's round."""
        return self._inner.fold(number, adapter)

    def memory(self) -> dict[str, torch.Tensor]:
        """Return what the inner strategy must not forget."""
        return self._inner.memory()

    def recall(self, memory: Mapping[str, torch.Tensor]) -> None:
        """Go on with what the inner strategy remembered."""
        self._inner.recall(memory)
