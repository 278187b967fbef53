"""What ``fedpeft-client ledger`` says: spent, left, per job, and what one more round costs.

Every epsilon of this file is for people or programs that read; the ledger itself decides
what may run. No record, patient or key is in it.
"""

import math
from dataclasses import dataclass
from typing import Any, Final

from fedpeft.data.records import count
from fedpeft.privacy.accounting import Spent, epsilon_of, most_steps
from fedpeft.privacy.law import Law, shown, with_steps
from fedpeft.privacy.ledger import Job, KnownDataset, LastRound, Ledger

SCHEMA: Final = 1
MANY_ROUNDS: Final = 1000
"""More rounds than this are not counted."""
_WEAKEST_FIRST: Final = ("record", "patient", "clinic")


@dataclass(frozen=True, slots=True, kw_only=True)
class NextRound:
    """One more round like the last one: what it brings the total to, and how many fit.

    ``rounds_left`` is None without a ``max_epsilon``, and at most ``MANY_ROUNDS``.
    """

    like: LastRound
    total: float
    rounds_left: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetReport:
    """What was spent of the privacy of one data set; ``unit`` is the least that is protected."""

    dataset: KnownDataset
    unit: str | None
    max_epsilon: float | None
    delta: float
    spent: Spent
    jobs: list[tuple[Job, float]]
    next_round: NextRound | None


def ledger_reports(ledger: Ledger, law: Law) -> list[DatasetReport]:
    """Return a report for each data set of an intact ledger.

    Raises:
        StorageError, LedgerDamaged: it cannot be read.
    """
    return [_report(ledger, known, law) for known in ledger.datasets()]


def _report(ledger: Ledger, known: KnownDataset, law: Law) -> DatasetReport:
    delta = law.delta_for(known.units)
    jobs = ledger.jobs(known.id)
    units = {job.unit for job in jobs}
    return DatasetReport(
        dataset=known,
        unit=next((unit for unit in _WEAKEST_FIRST if unit in units), None),
        max_epsilon=law.max_epsilon,
        delta=delta,
        spent=_spent(ledger, known.id, delta),
        jobs=[(job, epsilon_of(job.charges, delta).epsilon) for job in jobs],
        next_round=_next_round(ledger, known.id, delta, law.max_epsilon),
    )


def _spent(ledger: Ledger, dataset: int, delta: float) -> Spent:
    charges = ledger.charges(dataset)
    if not charges:
        return Spent(epsilon=0.0, epsilon_pld=0.0, epsilon_rdp=0.0, delta=delta)
    return epsilon_of(charges, delta)


def _next_round(
    ledger: Ledger, dataset: int, delta: float, max_epsilon: float | None
) -> NextRound | None:
    last = ledger.last_round(dataset)
    if last is None:
        return None
    charges = ledger.charges(dataset)
    total = epsilon_of(with_steps(charges, last.step, last.steps), delta).epsilon
    rounds_left = None
    if max_epsilon is not None:
        most = MANY_ROUNDS * last.steps
        unbounded = math.isinf(total)
        steps = 0 if unbounded else most_steps(charges, last.step, delta, max_epsilon, most)
        rounds_left = steps // last.steps
    return NextRound(like=last, total=total, rounds_left=rounds_left)


def report_lines(reports: list[DatasetReport]) -> list[str]:
    """Return the reports for people, a line each: subject, tab, text."""
    if not reports:
        return ["ledger\tnothing was charged yet"]
    return [line for report in reports for line in _lines(report)]


def _lines(report: DatasetReport) -> list[str]:
    known, delta = report.dataset, report.delta
    protected = f", each {report.unit} protected" if report.unit else ""
    lines = [
        f"data set {known.id}\t{known.units} units, first seen {_day(known.since)}{protected}",
        f"spent\t{spent_text(report.spent)}",
        f"left\t{_left_text(report)}",
        *(f"job\t{_job_text(job, epsilon, delta)}" for job, epsilon in report.jobs),
    ]
    if report.next_round is not None:
        lines.append(f"one more\t{_next_text(report, report.next_round)}")
    return lines


def spent_text(spent: Spent) -> str:
    """Return what was spent, for people."""
    if math.isinf(spent.epsilon):
        return shown(spent.epsilon)
    pld = "" if spent.epsilon_pld is None else f"by PLD {shown(spent.epsilon_pld)}, "
    return (
        f"epsilon {shown(spent.epsilon)} at delta {spent.delta:g} "
        f"({pld}by RDP {shown(spent.epsilon_rdp)})"
    )


def _left_text(report: DatasetReport) -> str:
    left = _left(report)
    if report.max_epsilon is None:
        return "no max_epsilon is set, so no round is refused"
    if left is None:
        return f"max_epsilon = {report.max_epsilon:g} cannot be kept any more"
    # Rounded down: what is left must not look like more than it is.
    return f"epsilon {math.floor(left * 1000) / 1000:.3f} of max_epsilon = {report.max_epsilon:g}"


def _job_text(job: Job, epsilon: float, delta: float) -> str:
    cost = shown(epsilon) if math.isinf(epsilon) else f"epsilon {shown(epsilon)} at delta {delta:g}"
    return (
        f"{job.federation}/{job.run}, {_day(job.first)} to {_day(job.last)}: "
        f"{count(job.rounds, 'round')}, {count(job.steps, 'step')}, each {job.unit}, by itself "
        f"{cost}"
    )


def _next_text(report: DatasetReport, following: NextRound) -> str:
    like = following.like
    what = f"round like the last one ({like.entry.run}, {count(like.steps, 'step')})"
    if math.isinf(following.total):
        return f"a {what} has {shown(following.total)}"
    cost = max(following.total - report.spent.epsilon, 0.0)
    text = f"a {what} would cost epsilon {shown(cost)} (total {shown(following.total)})"
    if following.rounds_left is None:
        return text
    many = " or more" if following.rounds_left >= MANY_ROUNDS else ""
    return f"{text}; {following.rounds_left}{many} such rounds still fit"


def report_json(reports: list[DatasetReport]) -> dict[str, Any]:
    """Return the reports for programs: a JSON object of schema 1, without infinities.

    An epsilon without a bound is null, and ``private`` beside it false.
    """
    return {"schema": SCHEMA, "datasets": [_dataset_json(report) for report in reports]}


def _dataset_json(report: DatasetReport) -> dict[str, Any]:
    known, spent = report.dataset, report.spent
    return {
        "dataset": known.id,
        "units": known.units,
        "unit": report.unit,
        "since": known.since,
        "delta": report.delta,
        "max_epsilon": report.max_epsilon,
        "private": math.isfinite(spent.epsilon),
        "epsilon": _finite(spent.epsilon),
        "epsilon_pld": _finite(spent.epsilon_pld),
        "epsilon_rdp": _finite(spent.epsilon_rdp),
        "left": _left(report),
        "jobs": [_job_json(job, epsilon) for job, epsilon in report.jobs],
        "next_round": report.next_round and _next_json(report, report.next_round),
    }


def _job_json(job: Job, epsilon: float) -> dict[str, Any]:
    return {
        "federation": job.federation,
        "run": job.run,
        "unit": job.unit,
        "first": job.first,
        "last": job.last,
        "rounds": job.rounds,
        "steps": job.steps,
        "private": math.isfinite(epsilon),
        "epsilon": _finite(epsilon),
    }


def _next_json(report: DatasetReport, following: NextRound) -> dict[str, Any]:
    private = math.isfinite(following.total)
    return {
        "federation": following.like.entry.federation,
        "run": following.like.entry.run,
        "steps": following.like.steps,
        "private": private,
        "epsilon": max(following.total - report.spent.epsilon, 0.0) if private else None,
        "total": _finite(following.total),
        "rounds_left": following.rounds_left,
    }


def _left(report: DatasetReport) -> float | None:
    if report.max_epsilon is None or math.isinf(report.spent.epsilon):
        return None
    return max(report.max_epsilon - report.spent.epsilon, 0.0)


def _finite(epsilon: float | None) -> float | None:
    return epsilon if epsilon is not None and math.isfinite(epsilon) else None


def _day(moment: str) -> str:
    return moment[: len("2026-01-31")]
