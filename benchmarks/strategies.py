"""All strategies side by side: loss and exact answers at equal rounds and at equal bytes.

On the embedded federation and on the ten clinics, with each clinic by itself as floor and
all rows in one place as ceiling, over three seeds; then with differential privacy
(epsilon = 8 for each record, noise at the clinics) and with a 4-bit base.

    python benchmarks/strategies.py --work runs/strategies --write docs/strategies.md

A run that is in the work folder is not made again, so the command can be stopped and given
once more. "Equal rounds" are whole runs. "Equal bytes" are runs of as many rounds as fit into
the bytes, up and down over all clinics, that a whole run of FedAvg moves; at most twice as
many as a whole run has. Each run's learning rate decays over its own rounds.
"""

import argparse
import datetime
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from report import bar, emit, machine
from strategies_figures import (
    CEILING,
    FLOOR,
    PEER,
    Field,
    as_markdown,
    bytes_ratio,
    finished_from,
    gap_closed,
    rows_of,
)
from strategies_plot import draw
from strategies_runs import NAMES, Run, figures_of, perform, prepare, settings_of

from fedpeft.config import StrategySettings
from fedpeft.errors import ConfigError, FedpeftError
from fedpeft_strategies.registry import require_possible
from fedpeft_strategies.table import write_section

DEFAULT = StrategySettings().name
CHEAPER = ("alternating", "ffa", "fedsa")
FEDERATIONS = ("embedded", "clinics")
ROUNDS = {
    ("embedded", "plain"): 12,
    ("clinics", "plain"): 6,
    ("embedded", "secagg"): 12,
    ("embedded", "dp"): 6,
    ("clinics", "dp"): 4,
    ("embedded", "nf4"): 6,
    ("clinics", "nf4"): 4,
}
"""A whole run, by federation and variant."""
SECONDS = {"embedded": (6.0, 4.7), "clinics": (12.0, 3.5)}
"""For the estimate: of what comes before a run's first round, and of a round, on an idle core."""
MEANINGS = {
    "plain": "Without noise, base model as it is",
    "secagg": "The default under secure aggregation",
    "dp": "Differential privacy: epsilon = 8 for each record, noise at the clinics",
    "nf4": "Base model in 4 bits (NF4)",
}
TITLES = {"embedded": "the embedded federation", "clinics": "the ten clinics"}


def main() -> None:
    """Make the runs that are missing, and print and write what all of them say."""
    options = _options()
    # Models are so small that a second thread costs more than it gains.
    os.environ["OMP_NUM_THREADS"] = "1"
    whole = list(_planned(options))
    failed = {} if options.as_is else _perform(whole, options)
    fitted = list(_fitted(whole, options))
    failed |= {} if options.as_is else _perform(fitted, options)
    every = [figures_of(run, options.work) for run in (*whole, *fitted)]
    found = [figures for figures in every if figures is not None]
    fields = _fields(found, options)
    if options.write is not None:
        picture = options.write.with_suffix(".svg")
        pictured = [field for field in fields if field.variant == "plain"]
        picture.write_text(draw(pictured, DEFAULT), "utf-8")
        write_section(options.write, "measured", _page(fields, picture.name))
    tables = {f"{each.federation}, {each.variant}": rows_of(each) for each in fields}
    emit("strategies", {"default": DEFAULT, "tables": tables, "failed": failed}, _bars(fields))
    sys.exit(1 if failed else 0)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("runs/strategies"), help="of the runs")
    parser.add_argument("--write", type=Path, help="page for the tables; the picture goes beside")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a core each")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=(FLOOR, CEILING, *NAMES), metavar="NAME")
    parser.add_argument("--federation", choices=(*FEDERATIONS, "both"), default="both")
    parser.add_argument("--as-is", action="store_true", help="make no runs, show those there are")
    parser.add_argument("--quick", action="store_true", help="two rounds of one seed, plain only")
    return parser.parse_args()


def _planned(options: argparse.Namespace) -> Iterator[Run]:
    """Yield the runs of the whole comparison that the product allows, the most important first."""
    for (federation, variant), rounds in _chosen(options).items():
        seeds = 1 if options.quick or not _has_seeds(variant) else options.seeds
        for seed in range(seeds):
            for name in _names(variant):
                run = Run(name, federation, variant, seed, rounds)
                if _allowed(run, tell=seed == 0):
                    yield run


def _fitted(whole: Sequence[Run], options: argparse.Namespace) -> Iterator[Run]:
    """Yield the runs at equal bytes that differ from those at equal rounds."""
    by_run = {
        run: finished_from(figures)
        for run in whole
        if run.variant == "plain" and (figures := figures_of(run, options.work)) is not None
    }
    for run, finished in by_run.items():
        peer = by_run.get(replace(run, name=PEER))
        if peer is None or run.name in (FLOOR, CEILING):
            continue
        rounds = min(finished.rounds_within(peer.end.bytes), 2 * run.rounds)
        if 1 <= rounds < run.rounds or (rounds > run.rounds and run.name in CHEAPER):
            yield replace(run, rounds=rounds)


def _chosen(options: argparse.Namespace) -> dict[tuple[str, str], int]:
    return {
        (federation, variant): 2 if options.quick else rounds
        for (federation, variant), rounds in ROUNDS.items()
        if options.federation in (federation, "both") and (variant == "plain" or not options.quick)
    }


def _has_seeds(variant: str) -> bool:
    return variant == "plain"


def _names(variant: str) -> Sequence[str]:
    if variant == "secagg":
        return (DEFAULT,)
    return (FLOOR, *NAMES, CEILING) if variant == "plain" else NAMES


def _allowed(run: Run, *, tell: bool) -> bool:
    if run.name in (FLOOR, CEILING):
        return True
    try:
        require_possible(settings_of(run))
    except ConfigError as refusal:
        if tell:
            _tell(f"left out: {run.name} on {run.federation}, {run.variant}: {refusal}")
        return False
    return True


def _minutes(runs: Sequence[Run], jobs: int) -> int:
    seconds = 0.0
    for run in runs:
        start, each = SECONDS[run.federation]
        seconds += start + run.rounds * each
    return round(seconds / max(1, min(jobs, len(runs))) / 60)


def _perform(runs: Sequence[Run], options: argparse.Namespace) -> dict[str, str]:
    """Make the runs that are missing, some at a time; return what went wrong, by run."""
    wanted = [run for run in runs if not options.only or run.name in options.only]
    missing = [run for run in wanted if figures_of(run, options.work) is None]
    _tell(
        f"{len(wanted)} runs, of which {len(wanted) - len(missing)} are there; the others take "
        f"about {_minutes(missing, options.jobs)} minutes with {options.jobs} jobs"
    )
    for federation in {run.federation for run in missing}:
        prepare(federation, options.work)
    failed, began = dict[str, str](), time.monotonic()
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        waiting = {pool.submit(perform, run, options.work): run for run in missing}
        for count, done in enumerate(as_completed(waiting), start=1):
            run, minutes = waiting[done], (time.monotonic() - began) / 60
            label = f"{run.federation} {run.variant} {run.name} {run.seed}, {run.rounds} rounds"
            try:
                found = done.result()
            except FedpeftError as error:
                failed[label] = str(error)
                _tell(f"failed: {label}: {error}")
                continue
            last = found["curve"][-1]["loss"]
            _tell(
                f"{count}/{len(missing)} after {minutes:.1f} min: {label}: loss {last:.4f}, "
                f"{found['seconds']} s"
            )
    return failed


def _fields(found: Sequence[dict[str, Any]], options: argparse.Namespace) -> list[Field]:
    runs = [finished_from(figures) for figures in found]
    fields = [
        Field.of(runs, federation, variant, rounds)
        for (federation, variant), rounds in _chosen(options).items()
    ]
    return [field for field in fields if field.runs]


def _page(fields: Sequence[Field], picture: str) -> str:
    """Return the section of the page: machine and date, then a table each."""
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    parts = [
        f"On {machine()}, {today}.\n",
        f"\n![Validation loss against bytes, a curve a strategy]({picture})\n",
    ]
    for field in fields:
        seeds = len({run.seed for run in field.runs})
        title = f"{MEANINGS[field.variant]}, {TITLES[field.federation]}"
        counted = f"{seeds} seeds" if seeds > 1 else "one seed"
        parts.append(f"\n**{title}**, {counted}:\n\n{as_markdown(field, DEFAULT)}")
        if own := [run.own_loss for run in field.whole(FLOOR) if run.own_loss is not None]:
            parts.append(
                f"\n{FLOOR} is each clinic's own model on the rows of all clinics; on those of "
                f"its own clinic the loss is {statistics.fmean(own):.3f}.\n"
            )
    return "".join(parts)


def _bars(fields: Sequence[Field]) -> dict[str, dict[str, Any]]:
    for field in fields:
        if (field.federation, field.variant) == ("embedded", "plain"):
            closed, ratio = gap_closed(field, DEFAULT), bytes_ratio(field, DEFAULT)
            found = {
                "gap_closed_by_the_default": (closed, ">=", 0.8),
                f"bytes_over_{PEER}": (ratio, "<=", 0.6),
            }
            return {
                key: bar(round(value, 4), op, wanted)
                for key, (value, op, wanted) in found.items()
                if value is not None
            }
    return {}


def _tell(sentence: str) -> None:
    print(f"strategies: {sentence}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
