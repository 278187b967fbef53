"""The program ``fedpeft``: simulate a federation, evaluate an adapter, run the demo."""

import json
import logging
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fedpeft.console import Program
from fedpeft.storage import write_atomically

program = Program(
    "fedpeft",
    "Fine-tune one language model across clinics without sharing a record.",
)


class EngineName(StrEnum):
    """How a simulated federation runs."""

    local = "local"
    flower = "flower"
    ray = "ray"


_Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="table.key=value over the configuration; may be repeated"),
]


@program.app.command()
def simulate(
    federation: Annotated[
        Path | None, typer.Argument(help="federation.toml; default: the embedded federation")
    ] = None,
    engine: Annotated[
        EngineName,
        typer.Option(help="local: one process; flower: the real network on loopback; ray: Ray"),
    ] = EngineName.local,
    out: Annotated[Path, typer.Option(help="directory of the results")] = Path("runs/simulation"),
    overrides: _Overrides = None,
) -> None:
    """Run a whole federation on this machine; started again, it goes on where it stopped.

    Reads the configuration, base model and clinics' files; writes OUT; sends nothing.
    """
    from fedpeft.config import FederationSettings, load_settings

    if federation is not None:
        # Before the heavy imports, so that a slip of the pen is told at once.
        load_settings(FederationSettings, federation, overrides or [])
    from fedpeft.simulation.display import Display
    from fedpeft.simulation.plan import plan_simulation
    from fedpeft.simulation.run import simulate as run_simulation

    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    simulation = plan_simulation(federation, overrides or [], engine=engine.value, out=out)
    settings = simulation.settings
    rounds, clinics = settings.rounds.count, len(settings.clinic)
    with Display().stage(settings.name, rounds=rounds, clinics=clinics) as stage:
        run_simulation(simulation, stage, stage.observe, stage.tell)
    program.say(f"the adapter is in {out / 'adapter'}, the figures in {out / 'summary.json'}")


@program.app.command()
def evaluate(
    model: Annotated[str, typer.Option(help="directory of the base model, or 'embedded'")],
    data: Annotated[Path, typer.Option(help="records to evaluate on")],
    adapter: Annotated[Path | None, typer.Option(help="adapter directory; none: the base")] = None,
    json_out: Annotated[Path | None, typer.Option("--json", help="write the result here")] = None,
    layout: Annotated[str | None, typer.Option("--format", help="record layout")] = None,
    max_length: Annotated[int | None, typer.Option(help="tokens; default: the context")] = None,
    quantization: Annotated[str, typer.Option(help="none or nf4")] = "none",
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16")] = "auto",
    skip_bad_rows: Annotated[bool, typer.Option(help="count bad rows instead of stopping")] = False,
) -> None:
    """Measure loss, perplexity and exact match of a model on records.

    Reads model, adapter and data; writes the JSON file if named; sends nothing.
    """
    from fedpeft.config import ModelSettings, parse_settings
    from fedpeft.evaluation.report import evaluate_files

    settings = parse_settings(
        ModelSettings,
        {"base": model, "quantization": quantization, "dtype": dtype},
        [],
        where="the command line",
    )
    report = evaluate_files(
        settings,
        data,
        adapter=adapter,
        layout=layout,
        max_length=max_length,
        skip_bad_rows=skip_bad_rows,
        say=program.say,
    )
    text = json.dumps(report, indent=2) + "\n"
    if json_out is None:
        typer.echo(text, nl=False)
    else:
        write_atomically(json_out, text.encode())
        program.say(f"wrote {json_out}")


@program.app.command()
def demo(
    out: Annotated[Path, typer.Option(help="directory of the results")] = Path("runs/demo"),
) -> None:
    """Show on made-up clinics what federating gains over training alone.

    Reads nothing; writes OUT; sends nothing.
    """
    from fedpeft.simulation.comparison import run_demo

    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    run_demo(out)
    program.say(f"the federated adapter is in {out / 'adapter'}, the figures in summary.json")


def run() -> None:
    """Entry point of the console script."""
    program.run()
