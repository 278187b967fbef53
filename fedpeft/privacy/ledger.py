"""The privacy ledger of a clinic: every step is charged in it before it runs.

*What it guarantees.* The steps of a data set that ran are among those charged, across
rounds, runs, base models, restarts and kills: a crash between charge and step loses
budget and never hides any. With ``max_epsilon`` set, all steps charged to a data set
together stay within it, however many processes charge at once: a round is refused before
its first step if not all its steps fit, and a step is refused if others spent the rest
meanwhile. Data sets are recognised by their units (``data_identity``). The format is in
``ledger_chain``, with what a check can and cannot find.

*What it does not.* Epsilon bounds what each step's unit gives away: steps that protect
single records say less about a patient with several.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from sqlite3 import Connection
from typing import Self

from fedpeft.config.privacy import LARGEST_DELTA
from fedpeft.errors import LedgerDamaged, PrivacyError
from fedpeft.privacy.accounting import fits
from fedpeft.privacy.charge import Charge
from fedpeft.privacy.data_identity import Dataset, identify, merged_into, parts_of
from fedpeft.privacy.law import Law, RoundEntry, require_lawful
from fedpeft.privacy.ledger_chain import (
    START,
    Anchor,
    Entry,
    anchor_path,
    chain_problems,
    read_anchor,
)
from fedpeft.privacy.ledger_check import ledger_problems
from fedpeft.privacy.ledger_file import START_ANEW, LedgerFile, has_row, last_row, now, rows_after
from fedpeft.privacy.ledger_queries import (
    Job,
    KnownDataset,
    LastRound,
    charged_in_attempt,
    charged_rounds,
    charged_since,
    charges,
    jobs,
    known_dataset,
    last_round,
    units_in,
)

__all__ = [
    "Dataset",
    "Job",
    "KnownDataset",
    "LastRound",
    "Law",
    "Ledger",
    "RoundBudget",
    "RoundEntry",
    "ledger_exists",
]


class Ledger:
    """The ledger in one file; threads may share it, and other processes may open it too."""

    def __init__(self, path: Path, *, timeout_s: float = 30.0) -> None:
        """Open the ledger, or start one where there is neither file nor anchor.

        Args:
            path: of the SQLite file; its folder exists.
            timeout_s: how long to wait for other programs that write to it.

        Raises:
            StorageError: it cannot be opened, or a newer fedpeft wrote it.
            LedgerDamaged: it is no ledger, or was removed while its anchor was not.
        """
        self._file = LedgerFile(path, timeout_s=timeout_s)
        self._checked = START

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    @property
    def path(self) -> Path:
        """The SQLite file."""
        return self._file.path

    def dataset(self, units: Iterable[str]) -> Dataset:
        """Return the data set that ``units`` belong to; unknown units are added to it.

        A single unit in common makes it the same data set; units of several join those
        into one. Only keyed hashes are kept.

        Args:
            units: patient ids, or digests of records where there are none. The caller
                writes one patient's id always in the same way.

        Raises:
            DataError: there is no unit.
            LedgerDamaged: see ``verify``.
            StorageError: the file cannot be written.
        """
        anchor = read_anchor(self._file.anchor_path)
        with self._file.transaction("IMMEDIATE") as database:
            self._require_intact(database, anchor)
            return identify(self._file, database, units)

    def open_round(
        self, dataset: int, entry: RoundEntry, step: Charge, steps: int, law: Law
    ) -> "RoundBudget":
        """Return the right to run ``steps`` steps; nothing is charged yet.

        Steps that ``entry.attempt`` has charged before count as paid. The first call also
        checks the whole ledger, later ones what came since.

        Args:
            dataset: its ``id``.
            entry: which round it is.
            step: what each step costs.
            steps: in the round, at least 1; a round without noise needs 1 only.
            law: the clinic's.

        Raises:
            BudgetSpent: the round would pass the clinic's bound.
            PrivacyError: the cost of a step is no valid one.
            LedgerDamaged: see ``verify``.
            StorageError: the file cannot be read.
            ValueError: the ledger has no such data set, or ``steps`` is below 1.
        """
        if steps < 1:
            raise ValueError(f"a round has at least 1 step, not {steps}")
        step = _checked(step)
        anchor = read_anchor(self._file.anchor_path)
        with self._file.transaction() as database:
            self._require_intact(database, anchor)
            parts = parts_of(database, dataset)
            spent, units = charges(database, parts), units_in(database, parts)
            paid = charged_in_attempt(database, parts, entry, step)
            if left := max(0, steps - len(paid)):
                require_lawful(law, spent, units, entry, step, left)
            seen = last_row(database).seq
            return RoundBudget(self._file, dataset, entry, step, left, law, seen, paid)

    def charges(self, dataset: int) -> dict[Charge, int]:
        """Return how many steps of each cost were charged to a data set.

        Raises:
            ValueError: the ledger has no such data set.
        """
        with self._file.transaction() as database:
            return charges(database, parts_of(database, dataset))

    def datasets(self) -> list[KnownDataset]:
        """Return the data sets, by id; of merged ones the one that they became."""
        with self._file.transaction() as database:
            ids = sorted(set(merged_into(database).values()))
            return [known_dataset(database, parts_of(database, dataset)) for dataset in ids]

    def jobs(self, dataset: int) -> list[Job]:
        """Return what each run charged to a data set, in the order of their first steps.

        Raises:
            ValueError: the ledger has no such data set.
        """
        with self._file.transaction() as database:
            return jobs(database, parts_of(database, dataset))

    def rounds(self) -> set[tuple[str, str, int]]:
        """Return federation, run and round of all that was charged, to compare with other logs."""
        with self._file.transaction() as database:
            return charged_rounds(database)

    def last_round(self, dataset: int) -> LastRound | None:
        """Return the round that was charged last; None if none was.

        Raises:
            ValueError: the ledger has no such data set.
        """
        with self._file.transaction() as database:
            return last_round(database, parts_of(database, dataset))

    def end(self) -> Anchor:
        """Return the number and hash of the last row, to be kept elsewhere and compared."""
        with self._file.transaction() as database:
            return last_row(database)

    def verify(self) -> list[str]:
        """Return a sentence for each row edited, missing or moved; none: it is intact.

        Raises:
            StorageError: the file or its anchor cannot be read.
        """
        try:
            anchor = read_anchor(self._file.anchor_path)
        except LedgerDamaged as error:
            return [str(error)]
        with self._file.transaction() as database:
            return ledger_problems(database, anchor)

    def _require_intact(self, database: Connection, anchor: Anchor | None) -> None:
        if self._checked != START and has_row(database, self._checked):
            rows = rows_after(database, self._checked.seq)
            problems = list(chain_problems(rows, anchor, self._checked))
        else:
            problems = ledger_problems(database, anchor)
        if problems:
            more = f" (and {len(problems) - 1} more problems)" if len(problems) > 1 else ""
            raise LedgerDamaged(
                f"the privacy ledger {self.path} was changed or damaged: {problems[0]}{more}, so "
                "what was spent is unknown and nothing is run; keep a copy to look into it; then, "
                f"of it and {self._file.anchor_path.name}, {START_ANEW}"
            )
        self._checked = last_row(database)


class RoundBudget:
    """The right to run the steps of one round, each charged before it runs."""

    def __init__(
        self,
        file: LedgerFile,
        dataset: int,
        entry: RoundEntry,
        step: Charge,
        steps: int,
        law: Law,
        seen: int,
        paid: set[int],
    ) -> None:
        self._file = file
        self._dataset = dataset
        self._entry = entry
        self._step = step
        self._left = steps
        self._law = law
        self._seen = seen
        self._paid = paid

    def charge(self, step_number: int) -> None:
        """Charge one step, unless this attempt has; only then may the step run.

        What the rest of the round needs is looked at again if others have charged the
        same data since, or if the round has more steps than it was opened for.

        Raises:
            BudgetSpent: the rest of the round no longer fits; nothing was charged.
            StorageError: the disk is full or failing, or the file locked; at worst the
                step was charged, and it must not run.
            LedgerDamaged: the file is no ledger any more.
        """
        if step_number in self._paid:
            self._paid.remove(step_number)
            return
        with self._file.transaction("IMMEDIATE") as database:
            parts = parts_of(database, self._dataset)
            if self._left < 1 or charged_since(database, parts, self._seen):
                require_lawful(
                    self._law,
                    charges(database, parts),
                    units_in(database, parts),
                    self._entry,
                    self._step,
                    max(self._left, 1),
                )
            seq = self._file.append(self._row(step_number))
        self._seen = seq
        self._left -= 1

    def _row(self, step_number: int) -> Entry:
        entry, step = self._entry, self._step
        return Entry(
            "charge",
            now(),
            dataset=self._dataset,
            digest=entry.attempt,
            federation=entry.federation,
            run=entry.run,
            round=entry.round,
            step=step_number,
            unit=entry.unit,
            noise=step.noise,
            sampling_rate=step.sampling_rate,
            noise_multiplier=step.noise_multiplier,
            l2=step.l2,
            l1=step.l1,
        )


def ledger_exists(path: Path) -> bool:
    """Return whether there is a ledger, or what is left of one."""
    return path.exists() or anchor_path(path).exists()


def _checked(step: Charge) -> Charge:
    """Return a valid cost as SQLite gives it back: floats, and no negative zero."""
    q, z, l2, l1 = (
        float(number) + 0.0
        for number in (step.sampling_rate, step.noise_multiplier, step.l2, step.l1)
    )
    noisy = step.noise != "none"
    if not (0 < q <= 1 and math.isfinite(z + l2 + l1) and min(z, l2, l1) >= 0 and (z > 0) == noisy):
        raise PrivacyError(
            f"a step with sampling rate {q}, {step.noise} noise of multiplier {z} and "
            f"sensitivities {l2} and {l1} cannot be charged, as its privacy loss is not defined: "
            "ask the central site to correct the job"
        )
    step = Charge(noise=step.noise, sampling_rate=q, noise_multiplier=z, l2=l2, l1=l1)
    # A cost that the accountant cannot add up would block the ledger: it says so now.
    fits({}, step, 0, LARGEST_DELTA, math.inf)
    return step
