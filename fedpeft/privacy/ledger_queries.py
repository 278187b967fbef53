"""What the rows of a privacy ledger add up to, for one data set.

Every function reads within a transaction, and takes the data set as all the ``parts``
that were merged into it. Must not write, and must not know epsilon.
"""

from dataclasses import dataclass
from sqlite3 import Connection
from typing import cast

from fedpeft.config.privacy import PrivacyUnit
from fedpeft.privacy.charge import Charge, NoiseKind
from fedpeft.privacy.law import RoundEntry

_COST = "noise, sampling_rate, noise_multiplier, l2, l1"


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownDataset:
    """A data set of the ledger: how many units it has, and when it was first seen."""

    id: int
    units: int
    since: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What one run charged to a data set; ``first`` and ``last`` are times, UTC."""

    federation: str
    run: str
    unit: PrivacyUnit
    first: str
    last: str
    rounds: int
    steps: int
    charges: dict[Charge, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class LastRound:
    """The last round charged to a data set: what its steps cost, and how many there were."""

    entry: RoundEntry
    step: Charge
    steps: int


def known_dataset(database: Connection, parts: tuple[int, ...]) -> KnownDataset:
    """Return a data set; its id is the lowest of its parts, as in every merge."""
    query = "SELECT time FROM entries WHERE kind = 'data' AND dataset IN (?) ORDER BY seq LIMIT 1"
    (since,) = database.execute(_of_parts(query, parts), parts).fetchone()
    return KnownDataset(id=min(parts), units=units_in(database, parts), since=since)


def units_in(database: Connection, parts: tuple[int, ...]) -> int:
    """Return how many units the data set has."""
    query = "SELECT sum(units) FROM entries WHERE kind = 'data' AND dataset IN (?)"
    return database.execute(_of_parts(query, parts), parts).fetchone()[0]


def charges(
    database: Connection, parts: tuple[int, ...], job: tuple[str, str, str] | None = None
) -> dict[Charge, int]:
    """Return how many steps of each cost were charged.

    Args:
        database: within a transaction.
        parts: of the data set.
        job: only those of this federation, run and unit.
    """
    of_job = "AND federation = ? AND run = ? AND unit = ? " if job else ""
    query = _of_parts(
        f"SELECT count(*), {_COST} FROM entries WHERE kind = 'charge' "  # noqa: S608
        f"AND dataset IN (?) {of_job}GROUP BY {_COST}",
        parts,
    )
    rows = database.execute(query, (*parts, *(job or ())))
    return {_charge(*cost): count for count, *cost in rows}


def jobs(database: Connection, parts: tuple[int, ...]) -> list[Job]:
    """Return what each run charged, in the order of their first steps."""
    query = _of_parts(
        "SELECT federation, run, unit, min(time), max(time), count(DISTINCT round), count(*) "
        "FROM entries WHERE kind = 'charge' AND dataset IN (?) "
        "GROUP BY federation, run, unit ORDER BY min(seq)",
        parts,
    )
    return [
        Job(
            federation=federation,
            run=run,
            unit=unit,
            first=first,
            last=last,
            rounds=rounds,
            steps=steps,
            charges=charges(database, parts, (federation, run, unit)),
        )
        for federation, run, unit, first, last, rounds, steps in database.execute(query, parts)
    ]


def charged_rounds(database: Connection) -> set[tuple[str, str, int]]:
    """Return federation, run and round of everything that was charged to any data set."""
    query = "SELECT DISTINCT federation, run, round FROM entries WHERE kind = 'charge'"
    return set(database.execute(query))


def last_round(database: Connection, parts: tuple[int, ...]) -> LastRound | None:
    """Return the round charged last; a step charged again after a restart counts once."""
    latest = _of_parts(
        f"SELECT federation, run, round, unit, {_COST} FROM entries "  # noqa: S608
        "WHERE kind = 'charge' AND dataset IN (?) ORDER BY seq DESC LIMIT 1",
        parts,
    )
    row = database.execute(latest, parts).fetchone()
    if row is None:
        return None
    federation, run, number, unit, *cost = row
    counted = _of_parts(
        "SELECT count(DISTINCT step) FROM entries WHERE kind = 'charge' AND dataset IN (?) "
        "AND federation = ? AND run = ? AND round = ? AND unit = ?",
        parts,
    )
    (steps,) = database.execute(counted, (*parts, *row[:4])).fetchone()
    entry = RoundEntry(federation=federation, run=run, round=number, unit=unit)
    return LastRound(entry=entry, step=_charge(*cost), steps=steps)


def charged_in_attempt(
    database: Connection, parts: tuple[int, ...], entry: RoundEntry, step: Charge
) -> set[int]:
    """Return the numbers of the steps that ``entry.attempt`` has charged at this very cost.

    What was charged at another cost does not count: the clinic may trust others less now.
    """
    if not entry.attempt:
        return set()
    query = _of_parts(
        "SELECT step FROM entries WHERE kind = 'charge' AND dataset IN (?) "
        "AND digest = ? AND unit = ? "
        "AND noise = ? AND sampling_rate = ? AND noise_multiplier = ? AND l2 = ? AND l1 = ?",
        parts,
    )
    cost = (step.noise, step.sampling_rate, step.noise_multiplier, step.l2, step.l1)
    rows = database.execute(query, (*parts, entry.attempt, entry.unit, *cost))
    return {number for (number,) in rows}


def charged_since(database: Connection, parts: tuple[int, ...], seen: int) -> bool:
    """Return whether rows after ``seen`` charge one of the parts or could join others to them."""
    query = "SELECT 1 FROM entries WHERE seq > ? AND (kind <> 'charge' OR dataset IN (?)) LIMIT 1"
    return database.execute(_of_parts(query, parts), (seen, *parts)).fetchone() is not None


def _charge(noise: str, q: float, z: float, l2: float, l1: float) -> Charge:
    kind = cast(NoiseKind, noise)
    return Charge(noise=kind, sampling_rate=q, noise_multiplier=z, l2=l2, l1=l1)


def _of_parts(query: str, parts: tuple[int, ...]) -> str:
    """Return ``query`` with a placeholder for each part in its ``IN (?)``."""
    return query.replace("IN (?)", f"IN ({', '.join('?' * len(parts))})")
