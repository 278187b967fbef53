"""What the strategies share that bound what a few arbitrary updates can do.

Robust statistics compare updates coordinate by coordinate, or by their distances. For
LoRA that means nothing where each clinic may turn its pair (B, A) into (B·M, M⁻¹·A), which
is the same adapter. In a round of ``alternating`` it does: all clinics train the same
factor beside the same orthonormal other one, so a coordinate is the same direction for
all, and the distance of two changes is that of the products BA. Rounds, start, gauge and
mixing are therefore those of ``alternating``; only the mean of the changes is replaced.

All clinics count the same, whatever rows they claim: a weight is a number that an attacker
may choose. A change with NaN or infinity is left out, and its sender is one of the clinics
that the strategy was told to expect.

This module knows nothing of how the changes came here.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence

import torch

from fedpeft.adapters import AdapterState
from fedpeft.errors import AdapterError
from fedpeft_strategies.alternating import Alternating
from fedpeft_strategies.strategy import Aggregated, Fold

BLOCK = 1 << 20
"""Coordinates of all clinics that are looked at together; bounds the working memory."""


class Robust(Alternating):
    """Alternating rounds that end with a robust centre of the changes, not their mean.

    The server must open each update, and holds all of a round: n · P/2 coordinates.
    """

    @abstractmethod
    def centre(self, changes: Sequence[torch.Tensor], left_out: int) -> torch.Tensor:
        """Return what stands for all clinics.

        Args:
            changes: one finite vector of the round's coordinates a clinic, at least one.
            left_out: how many other clinics sent NaN or infinity.

        Returns:
            A vector of the same shape and dtype; the order of ``changes`` does not matter.

        Raises:
            AdapterError: there are too few for what may be arbitrary.
        """

    def fold(self, number: int, adapter: AdapterState) -> Fold:
        """Begin a round; its updates are kept until the last one is there."""
        return RobustFold(self, number, adapter)

    def arbitrary(self, present: int, left_out: int, least: int) -> int:
        """Return how many of the ``present`` changes may be arbitrary.

        They are ``strategy.byzantine`` less those that were left out, who were some of them.

        Raises:
            AdapterError: fewer than ``least`` clinics sent a change, or more than
                ``strategy.byzantine`` sent one that is not finite.
        """
        bound, name = self.settings.byzantine, self.declaration.name
        if present + left_out < least:
            raise AdapterError(
                f"{name!r} with strategy.byzantine = {bound} needs {least} clinics in a round, and "
                f"{present + left_out} sent an update; raise rounds.minimum_clinics to {least} or "
                "lower strategy.byzantine"
            )
        if left_out > bound:
            raise AdapterError(
                f"{left_out} updates of this round hold NaN or infinity where {name!r} was told to "
                f"expect {bound} wrong ones; find out which clinics fail before you raise "
                "strategy.byzantine"
            )
        return bound - left_out


class FiniteFold(Fold):
    """The changes of one round, of which those with NaN or infinity are left out."""

    def __init__(self, strategy: Robust, number: int, adapter: AdapterState) -> None:
        self.strategy = strategy
        self.schema = adapter.schema.part(strategy.sends(number))
        self.left_out = 0
        self._number = number
        self._adapter = adapter
        self._count = 0

    def add(self, change: AdapterState, weight: float) -> None:
        """Take a change; the weight is not looked at.

        Raises:
            SchemaMismatch: it is of another part, or of a lower rank.
        """
        self.schema.require(change.schema.hash, source="an update")
        if bool(torch.isfinite(change.values).all()):
            self.take(change.values)
            self._count += 1
        else:
            self.left_out += 1

    def result(self) -> Aggregated:
        """Return the adapter moved by the centre of the changes.

        Raises:
            AdapterError: there were too few.
        """
        if not self._count:
            raise AdapterError(
                f"no update of this round can be used, and {self.left_out} hold NaN or infinity; "
                "look at the clinics' logs, and lower training.learning_rate if they diverge"
            )
        centre = self.centre(self._count).to(self._adapter.values.dtype)
        return self.strategy.finished(
            self._number, self._adapter, AdapterState(self.schema, centre)
        )

    @abstractmethod
    def take(self, change: torch.Tensor) -> None:
        """Take in the finite coordinates of one clinic."""

    @abstractmethod
    def centre(self, count: int) -> torch.Tensor:
        """Return what stands for the ``count`` changes that were taken, at least one."""


class RobustFold(FiniteFold):
    """The changes of one round, all kept."""

    def __init__(self, strategy: Robust, number: int, adapter: AdapterState) -> None:
        super().__init__(strategy, number, adapter)
        self._changes: list[torch.Tensor] = []

    def take(self, change: torch.Tensor) -> None:
        """Keep it."""
        self._changes.append(change)

    def centre(self, count: int) -> torch.Tensor:
        """Return the strategy's centre of all."""
        return self.strategy.centre(self._changes, self.left_out)


def by_coordinate(
    changes: Sequence[torch.Tensor], centre: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Apply ``centre`` to the sorted values of every coordinate, block by block.

    ``centre`` maps ascending (changes, coordinates) float64 to (coordinates,) float64.
    """
    result = torch.empty_like(changes[0])
    for start in range(0, result.numel(), BLOCK):
        block = slice(start, start + BLOCK)
        values = torch.stack([change[block] for change in changes]).sort(dim=0).values
        result[block] = centre(values.double()).to(result.dtype)
    return result
