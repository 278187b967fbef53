"""The most privacy that a clinic gives away, and what a round is told that would pass it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from fedpeft.config.privacy import PrivacyUnit
from fedpeft.errors import BudgetSpent
from fedpeft.privacy.accounting import epsilon_of, fits, most_steps
from fedpeft.privacy.calibration import default_delta
from fedpeft.privacy.charge import Charge

_WAYS_OUT: Final = (
    "let those who answer for the data change max_epsilon, or wait for a job that needs less"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Law:
    """The bound that a clinic sets on the privacy loss of each of its data sets.

    ``max_epsilon`` None: no bound, everything is charged and nothing refused. ``delta``
    None: the default for the number of units in the data set.
    """

    max_epsilon: float | None = None
    delta: float | None = None

    def delta_for(self, units: int) -> float:
        """Return the delta that holds for a data set of ``units`` units."""
        return default_delta(units) if self.delta is None else self.delta


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundEntry:
    """Whom the steps of a round are charged for: no name of a file, no record.

    ``attempt`` is 64 hexadecimal digits drawn for one stream of samples and noise: a step
    that was charged in it, and is computed again from the same keys, is not charged
    again. Empty: every step is charged.
    """

    federation: str
    run: str
    round: int
    unit: PrivacyUnit
    attempt: str = ""


def require_lawful(
    law: Law,
    spent: Mapping[Charge, int],
    units: int,
    entry: RoundEntry,
    step: Charge,
    steps: int,
) -> None:
    """Refuse a round that could take a data set past the clinic's bound.

    Args:
        law: the clinic's.
        spent: the steps charged to the data set until now.
        units: in the data set.
        entry: the round.
        step: what each step of the round costs.
        steps: that are still to come.

    Raises:
        BudgetSpent: the bound would be passed, or cannot be kept, as steps have no noise.
    """
    limit = law.max_epsilon
    if limit is None:
        return
    where = f"round {entry.round} of run {entry.run} is refused"
    if step.noise == "none":
        raise BudgetSpent(
            f"{where}: it trains without noise, so no bound on the privacy loss holds, and this "
            f"clinic's max_epsilon is {limit:g}: ask the central site for a job with a [privacy] "
            "table, or let those who answer for the data remove max_epsilon"
        )
    unprotected = sum(count for charge, count in spent.items() if charge.noise == "none")
    if unprotected:
        raise BudgetSpent(
            f"{where}: the same data were trained on without noise before (rows of the ledger: "
            f"{unprotected}), so max_epsilon = {limit:g} cannot be kept any more: take part with "
            "other data, or let those who answer for the data remove max_epsilon"
        )
    delta = law.delta_for(units)
    if not fits(spent, step, steps, delta, limit):
        raise BudgetSpent(f"{where}: {_overspent(spent, step, steps, delta, limit)}")


def _overspent(
    spent: Mapping[Charge, int], step: Charge, steps: int, delta: float, limit: float
) -> str:
    before = epsilon_of(spent, delta).epsilon if spent else 0.0
    after = epsilon_of(with_steps(spent, step, steps), delta).epsilon
    possible = most_steps(spent, step, delta, limit, steps)
    rest = f"at most {possible} such steps still fit" if possible else "no such step fits any more"
    return (
        f"its {steps} steps would take the privacy loss of this clinic's data from epsilon "
        f"{shown(before)} to {shown(after)} at delta {delta:g}, past max_epsilon = {limit:g}, and "
        f"{rest}: {_WAYS_OUT}"
    )


def with_steps(spent: Mapping[Charge, int], step: Charge, steps: int) -> dict[Charge, int]:
    """Return what is spent after ``steps`` more of ``step``."""
    return {**spent, step: spent.get(step, 0) + steps}


def shown(epsilon: float) -> str:
    """Return an epsilon for people, rounded up so that it never looks smaller than it is."""
    if math.isinf(epsilon):
        return "no bound (trained without noise)"
    return f"{math.ceil(epsilon * 1000) / 1000:.3f}"
