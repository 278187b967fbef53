"""The clinic's ledger at work: no round reads a record before it is charged.

The clinic's own bound decides. The server is told the reason of a refusal and, of a
round that was done, numbers that depend on no record.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from fedpeft.config import PrivacySettings
from fedpeft.privacy.accounting import epsilon_of
from fedpeft.privacy.charge import Charge
from fedpeft.privacy.law import Law, RoundEntry
from fedpeft.privacy.ledger import Dataset, Ledger
from fedpeft.protocol import Job
from fedpeft.protocol.privacy import ClinicPrivacy
from fedpeft_client.rounds.clinic import Clinic
from fedpeft_client.rounds.cost import Cost, cost_of
from fedpeft_client.rounds.records import ClinicRows


@dataclass(frozen=True, slots=True, kw_only=True)
class Protection:
    """A round that may be run.

    ``charge`` is called with each step's number, from 1, before the step reads a record;
    a round without noise is charged as one step.
    """

    cost: Cost
    charge: Callable[[int], None]
    _losses: Callable[[], Mapping[Charge, int]]

    def report(self, privacy: PrivacySettings, colluding: int) -> ClinicPrivacy:
        """Return what this federation has cost the data until now."""
        charges, delta = self._losses(), self.cost.delta
        spent = epsilon_of(charges, delta)
        views = _views(privacy, colluding)
        return ClinicPrivacy(
            epsilon=_bound(spent.epsilon),
            delta=delta,
            epsilon_rdp=_bound(spent.epsilon_rdp),
            steps=sum(charges.values()),
            noise_multiplier=self.cost.noise_multiplier,
            clip=privacy.clip,
            **{
                name: _bound(epsilon_of(_seen(charges, self.cost.step, *by), delta).epsilon)
                for name, by in views.items()
            },
        )


class Protector:
    """The ledgers of the clinics in this process; ``tell`` hears what a ledger knows of a file."""

    def __init__(self, tell: Callable[[str], None] | None = None) -> None:
        self._ledgers: dict[str, Ledger] = {}
        self._datasets: dict[str, tuple[ClinicRows, Dataset]] = {}
        self._tell = tell

    def open(
        self,
        clinic: Clinic,
        job: Job,
        run: int,
        rows: ClinicRows,
        coordinates: int,
        attempt: str = "",
    ) -> Protection:
        """Ask the ledger for the next round of ``job``; see ``cost_of`` for ``coordinates``.

        ``attempt`` is that of :class:`fedpeft.privacy.law.RoundEntry`.

        Raises:
            BudgetSpent: the clinic's bound would be passed, or cannot be kept.
            PolicyRefused, PrivacyError, DataError: see ``cost_of``.
            LedgerDamaged, StorageError: the ledger cannot be used.
        """
        cost = cost_of(clinic, job, rows.examples, coordinates)
        ledger = self._ledger(clinic)
        dataset = self._dataset(clinic, ledger, rows)
        entry = RoundEntry(
            federation=clinic.federation,
            run=str(run),
            round=job.round,
            unit=cost.unit,
            attempt=attempt,
        )
        law = Law(max_epsilon=clinic.privacy.max_epsilon, delta=clinic.privacy.delta)
        budget = ledger.open_round(dataset.id, entry, cost.step, cost.steps, law)
        return Protection(
            cost=cost,
            charge=budget.charge,
            _losses=lambda: _of_federation(ledger, dataset, clinic.federation),
        )

    def _ledger(self, clinic: Clinic) -> Ledger:
        if clinic.name not in self._ledgers:
            self._ledgers[clinic.name] = Ledger(clinic.ledger)
        return self._ledgers[clinic.name]

    def _dataset(self, clinic: Clinic, ledger: Ledger, rows: ClinicRows) -> Dataset:
        """Return the ledger's data set of ``rows``, looked up once for the same rows."""
        known = self._datasets.get(clinic.name)
        if known is not None and known[0] is rows:
            return known[1]
        dataset = ledger.dataset(rows.keys)
        self._datasets[clinic.name] = rows, dataset
        if self._tell is not None:
            self._tell(f"{clinic.name}: {_introduction(dataset)}")
        return dataset


def _of_federation(ledger: Ledger, dataset: Dataset, federation: str) -> dict[Charge, int]:
    total: dict[Charge, int] = {}
    for job in ledger.jobs(dataset.id):
        if job.federation == federation:
            for charge, count in job.charges.items():
                total[charge] = total.get(charge, 0) + count
    return total


def _views(privacy: PrivacySettings, colluding: int) -> dict[str, tuple[float, float]]:
    """Return by what the noise that was counted on differs in the two other views.

    First for steps of this job. Among how many clinics other jobs shared theirs is not
    written down, hence second: it stays what was counted on, or counts as none.
    """
    honest = privacy.honest_clinics
    if privacy.mechanism != "distributed" or honest is None:
        return {}
    counted = honest - colluding
    return {
        "epsilon_outside": (math.sqrt(honest / counted), 1.0),
        "epsilon_alone": (math.sqrt(1 / counted), 0.0),
    }


def _seen(
    charges: Mapping[Charge, int], step: Charge, own: float, others: float
) -> dict[Charge, int]:
    """Return the charges with ``own`` times the noise in steps like ``step``, and ``others``
    times what was shared in other jobs. Noise that a clinic added alone all see alike.
    """
    total: dict[Charge, int] = {}
    for charge, count in charges.items():
        alike = replace(charge, sampling_rate=step.sampling_rate) == step
        by = own if alike else others if charge.noise == "skellam" else 1.0
        seen = replace(charge, noise_multiplier=charge.noise_multiplier * by)
        total[seen] = total.get(seen, 0) + count
    return total


def _bound(epsilon: float) -> float | None:
    return None if math.isinf(epsilon) else epsilon


def _introduction(dataset: Dataset) -> str:
    if dataset.new:
        return (
            f"the privacy ledger has not seen these records: data set {dataset.id} of "
            f"{dataset.added} units begins with nothing spent"
        )
    joined = f", now one with data set {', '.join(map(str, dataset.merged))}"
    return (
        f"the privacy ledger knows these records as data set {dataset.id} ({dataset.known} units "
        f"known, {dataset.added} added{joined if dataset.merged else ''}): what was spent counts"
    )
