"""What the runs of ``strategies.py`` say: losses at equal rounds and at equal bytes, as tables.

Reads figures that runs have left; starts none and draws nothing. A curve has one point a
round, from round 0, the start: the validation loss in nats per answer token, that of the
worst clinic, and the bytes that all clinics together have sent and received until then,
evaluation and headers included.
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

FLOOR, CEILING, PEER = "local-only", "pooled", "fedavg"
"""What every strategy lies between, and the one whose bytes are the measure (FedIT)."""
_TOLERANCE = 1.01  # headers of a message differ by some bytes from run to run


@dataclass(frozen=True)
class Point:
    """A finished round; ``worst`` and ``loss`` are NaN where clinics report none."""

    round: int
    bytes: int
    loss: float
    worst: float


@dataclass(frozen=True)
class Finished:
    """One run: its curve, and the share of held-out questions that its end answers exactly."""

    name: str
    federation: str
    variant: str
    seed: int
    rounds: int
    curve: tuple[Point, ...]
    exact: float | None
    own_loss: float | None = None
    """Of clinics by themselves: each model on its own clinic's rows."""

    @property
    def end(self) -> Point:
        """The point after the last round."""
        return self.curve[-1]

    def rounds_within(self, budget: float) -> int:
        """Return how many rounds of such a run fit into ``budget`` bytes."""
        start = self.curve[0].bytes
        return int((budget * _TOLERANCE - start) / ((self.end.bytes - start) / self.rounds))


def points_of(records: Iterable[dict[str, Any]]) -> list[Point]:
    """Return the curve of a run from the content of its ``round.json`` files, in order."""
    total, curve = 0, list[Point]()
    for each in records:
        total += each["bytes_up"] + each["bytes_down"]
        worst = max(each["per_clinic"].values(), default=math.nan)
        loss = math.nan if each["valid_loss"] is None else each["valid_loss"]
        curve.append(Point(each["round"], total, loss, worst))
    return curve


def finished_from(content: dict[str, Any]) -> Finished:
    """Read the figures of one run, as ``strategies_runs.py`` writes them."""
    return Finished(
        name=content["name"],
        federation=content["federation"],
        variant=content["variant"],
        seed=content["seed"],
        rounds=content["rounds"],
        curve=tuple(Point(**point) for point in content["curve"]),
        exact=content["exact"],
        own_loss=content.get("own_loss"),
    )


@dataclass(frozen=True)
class Field:
    """All runs of one federation and variant, ``rounds`` of them being a whole run."""

    federation: str
    variant: str
    rounds: int
    runs: tuple[Finished, ...]

    @classmethod
    def of(cls, runs: Iterable[Finished], federation: str, variant: str, rounds: int) -> "Field":
        """Choose the runs of one federation and variant."""
        chosen = (run for run in runs if (run.federation, run.variant) == (federation, variant))
        return cls(federation, variant, rounds, tuple(chosen))

    def names(self) -> list[str]:
        """Return what was run, in the order of the first seed."""
        return list(dict.fromkeys(run.name for run in self.runs))

    def whole(self, name: str) -> list[Finished]:
        """Return the runs of one strategy at equal rounds, one a seed."""
        return [run for run in self.runs if run.name == name and run.rounds == self.rounds]

    def budget(self) -> float | None:
        """Return the bytes that a whole run of the peer takes; None if there is none."""
        totals = [run.end.bytes for run in self.whole(PEER)]
        return statistics.fmean(totals) if totals else None

    def equal_bytes(self, name: str) -> list[Finished]:
        """Return the runs of one strategy that end at the bytes of the peer, one a seed.

        Those that were made as long as the bytes allow; else whole runs, if they take as many
        bytes but for a tenth; else none.
        """
        if fitted := [run for run in self.runs if run.name == name and run.rounds != self.rounds]:
            return fitted
        budget, whole = self.budget(), self.whole(name)
        return [run for run in whole if budget and abs(run.end.bytes / budget - 1) <= 0.1]


def bytes_ratio(field: Field, name: str) -> float | None:
    """Return the bytes of ``name`` over those of the peer at equal rounds."""
    ours, theirs = [run.end.bytes for run in field.whole(name)], field.budget()
    return statistics.fmean(ours) / theirs if ours and theirs else None


def gap_closed(field: Field, name: str) -> float | None:
    """Return the share of the way from floor to ceiling in exact match at equal rounds."""
    floor, ceiling, reached = (_mean_exact(field.whole(of)) for of in (FLOOR, CEILING, name))
    if floor is None or ceiling is None or reached is None or ceiling == floor:
        return None
    return (reached - floor) / (ceiling - floor)


def rows_of(field: Field) -> list[dict[str, Any]]:
    """Return the figures of each name at equal rounds and at equal bytes; lists are by seed."""
    return [
        {
            "name": name,
            "equal_rounds": _figures(field.whole(name)),
            "equal_bytes": _figures(field.equal_bytes(name)),
        }
        for name in field.names()
    ]


def as_markdown(field: Field, default: str) -> str:
    """Return the table of one federation and variant; figures are mean ± half their range."""
    rows, questions = rows_of(field), any(run.exact is not None for run in field.runs)
    exact = ["exact answers"] if questions else []
    heads = [f"after {field.rounds} rounds:", "loss", "worst clinic", *exact, "MB"]
    heads += [f"at the bytes of {PEER}: loss (rounds)", *exact]
    lines = [heads, ["---"] * len(heads)]
    for row in rows:
        name = f"**{row['name']}**" if row["name"] == default else row["name"]
        rounds, equal = row["equal_rounds"], row["equal_bytes"]
        line = [name, _spread(rounds["loss"]), _spread(rounds["worst"])]
        line += [_share(rounds["exact"])] if questions else []
        if row["name"] not in (FLOOR, CEILING):
            line += [_megabytes(rounds["bytes"]), _fitting(equal)]
            line += [_share(equal["exact"])] if questions else []
        lines.append(line + [""] * (len(heads) - len(line)))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _mean_exact(runs: Sequence[Finished]) -> float | None:
    shares = [run.exact for run in runs if run.exact is not None]
    return statistics.fmean(shares) if shares else None


def _figures(runs: Sequence[Finished]) -> dict[str, Any]:
    return {
        "loss": [run.end.loss for run in runs],
        "worst": [run.end.worst for run in runs if math.isfinite(run.end.worst)],
        "exact": [run.exact for run in runs if run.exact is not None],
        "bytes": [run.end.bytes for run in runs],
        "rounds": [run.rounds for run in runs],
    }


def _fitting(figures: dict[str, Any]) -> str:
    if not figures["loss"]:
        return "–"
    return f"{_spread(figures['loss'])} ({round(statistics.fmean(figures['rounds']))})"


def _share(shares: Sequence[float]) -> str:
    return f"{_spread([100 * share for share in shares], 1)} %" if shares else "–"


def _megabytes(totals: Sequence[int]) -> str:
    return f"{statistics.fmean(totals) / 1e6:.1f}" if totals else "–"


def _spread(values: Sequence[float], digits: int = 3) -> str:
    """Return mean ± half the range, or one value alone."""
    if not values:
        return "–"
    text = f"{statistics.fmean(values):.{digits}f}"
    if len(values) == 1:
        return text
    return f"{text} ± {(max(values) - min(values)) / 2:.{digits}f}"
