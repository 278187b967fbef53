"""The program ``fedpeft``: list strategies, simulate, evaluate and audit, run the demo."""

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
def strategies(
    as_json: Annotated[bool, typer.Option("--json", help="print them for programs")] = False,
) -> None:
    """List the aggregation strategies: what each does, needs and gives.

    Reads and writes nothing; sends nothing.
    """
    from rich.console import Console

    from fedpeft_strategies.registry import declarations
    from fedpeft_strategies.table import as_json as in_json
    from fedpeft_strategies.table import print_table

    if as_json:
        typer.echo(in_json(declarations()), nl=False)
    else:
        print_table(declarations(), Console(highlight=False))


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
def plant(
    data: Annotated[Path, typer.Argument(help="the clinic's training records; left as they are")],
    out: Annotated[Path, typer.Option(help="new .jsonl file to train on instead")],
    key: Annotated[Path, typer.Option(help="new file for the secret audit key; keep it here")],
    canaries: Annotated[int, typer.Option(help="secrets drawn per number of copies")] = 32,
    share: Annotated[float, typer.Option(help="of patients of whom a coin decides")] = 0.2,
    layout: Annotated[str | None, typer.Option("--format", help="record layout")] = None,
    skip_bad_rows: Annotated[bool, typer.Option(help="count bad rows instead of stopping")] = False,
) -> None:
    """Plant made-up secrets in a copy of training records, to audit an adapter later.

    Reads DATA; writes OUT and KEY, for their owner only; sends nothing.
    """
    from fedpeft.audit import Planting
    from fedpeft.audit import plant as plant_canaries

    planting = Planting(canaries=canaries, share=share)
    planted = plant_canaries(data, out, key, planting, layout=layout, skip_bad_rows=skip_bad_rows)
    program.say(f"wrote {out}: {planted.describe()}")
    program.say(f"keep {key} secret and here: whoever has it knows which records were planted")


@program.app.command()
def audit(
    adapter: Annotated[Path, typer.Argument(help="adapter directory to attack")],
    model: Annotated[str, typer.Option(help="directory of the base model, or 'embedded'")],
    key: Annotated[list[Path], typer.Option(help="audit key of 'plant'; may be repeated")],
    reference: Annotated[
        Path | None, typer.Option(help="adapter that saw none of it; default: the base model")
    ] = None,
    samples: Annotated[int, typer.Option(help="other secrets to rank each canary among")] = 256,
    delta: Annotated[float, typer.Option(help="of the guarantee that is audited")] = 1e-5,
    json_out: Annotated[Path | None, typer.Option("--json", help="write the report here")] = None,
    plot: Annotated[Path | None, typer.Option(help="write the picture here (SVG)")] = None,
    gate: Annotated[
        Path | None, typer.Option(help="federation.toml with the limits in [release]")
    ] = None,
    max_auc: Annotated[float | None, typer.Option(help="limit, before that of --gate")] = None,
    max_exposure: Annotated[float | None, typer.Option(help="limit in bits, likewise")] = None,
    release: Annotated[
        Path | None, typer.Option(help="new directory for the adapter, if it keeps the limits")
    ] = None,
    max_length: Annotated[int | None, typer.Option(help="tokens; default: the context")] = None,
    quantization: Annotated[str, typer.Option(help="none or nf4")] = "none",
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16")] = "auto",
) -> None:
    """Attack an adapter, and say what it gives away of the records behind the keys.

    Reads model, adapter, keys and the records that they name; writes what is named; sends nothing.
    """
    from fedpeft.audit import Attack, draw, require_release, run_audit
    from fedpeft.audit import release as release_adapter
    from fedpeft.audit.command import limits_of, show_progress
    from fedpeft.config import ModelSettings, parse_settings

    limits = limits_of(gate, max_auc=max_auc, max_exposure=max_exposure, needed=release is not None)
    settings = parse_settings(
        ModelSettings,
        {"base": model, "quantization": quantization, "dtype": dtype},
        [],
        where="the command line",
    )
    attack = Attack(
        model=settings,
        adapter=adapter,
        keys=tuple(key),
        reference=reference,
        samples=samples,
        delta=delta,
        max_length=max_length,
    )
    with show_progress() as progress:
        report = run_audit(attack, program.say, progress)
    for sentence in report.sentences():
        program.say(sentence)
    text = json.dumps(report.as_json(), indent=2) + "\n"
    if json_out is None:
        typer.echo(text, nl=False)
    else:
        write_atomically(json_out, text.encode())
    if plot is not None:
        write_atomically(plot, draw(report).encode())
    require_release(report, limits, adapter)
    if release is not None:
        release_adapter(adapter, release)
        program.say(f"the adapter keeps the limits and is released in {release}")


@program.app.command()
def bundle(
    model: Annotated[Path, typer.Option(help="directory of the base model, or 'embedded'")],
    out: Annotated[Path, typer.Option(help="the tar file to write")] = Path("fedpeft-offline.tar"),
    wheels: Annotated[
        Path | None, typer.Option(help="folder of wheels; default: gathered with pip now")
    ] = None,
    config: Annotated[
        list[Path] | None,
        typer.Option(help="a file to go along, such as a client.toml; may be repeated"),
    ] = None,
    sign_key: Annotated[
        Path | None,
        typer.Option(
            help="identity to sign with, such as SITE/keys/identity.key; default: its own"
        ),
    ] = None,
    passphrase: Annotated[
        bool, typer.Option("--passphrase", help="that identity is encrypted; asked for")
    ] = False,
    key_file: Annotated[
        Path | None, typer.Option(help="that identity is encrypted with the content of this file")
    ] = None,
) -> None:
    """Make one file that installs fedpeft and the base model where there is no network.

    Reads the model, the wheels, the files named and the key; writes OUT, and beside it
    fedpeft-bundle.key if no key is named; sends nothing, but without --wheels pip asks
    its package index for the wheels.
    """
    from fedpeft.bundle.command import Wish, build

    wish = Wish(
        model=model,
        out=out,
        wheels=wheels,
        config=tuple(config or ()),
        sign_key=sign_key,
        passphrase=passphrase,
        key_file=key_file,
    )
    made, signer = build(wish, program.say)
    program.say(
        f"wrote {out}, {made.size / 1e6:,.1f} MB; tell the clinics by telephone what follows"
    )
    program.say(f"SHA-256 of the file   {made.sha256}")
    program.say(f"signed by             {signer.public.fingerprint}")


@program.app.command()
def check_bundle(
    file: Annotated[Path, typer.Argument(help="the tar file that `fedpeft bundle` wrote")],
    fingerprint: Annotated[
        str | None, typer.Option(help="of the key that must have signed it, as heard by telephone")
    ] = None,
) -> None:
    """Check a bundle before it is unpacked: that it is whole, and who signed it.

    Reads FILE; writes and sends nothing.
    """
    from fedpeft.bundle import check_bundle as check

    found = check(file, signer=fingerprint)
    program.say(
        f"{file} is whole: release {found.release}, {found.files} files, base model "
        f"{found.model_fingerprint}, signed by {found.signer}"
    )
    if fingerprint is None:
        program.say("compare the signer with the central site's by telephone before you install it")


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
