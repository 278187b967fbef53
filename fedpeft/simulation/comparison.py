"""The demo: what federating gains over training alone, shown on the embedded federation.

Trains each clinic alone, all of them federated, and one model on the pooled
records; then asks every model the held-out questions of all clinics.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from pydantic import BaseModel
from rich.table import Table

from fedpeft.config import ClinicSettings, FederationSettings
from fedpeft.console import people
from fedpeft.data import EncodedExample, encode, read_records
from fedpeft.demo.clinics import DemoClinic, write_federation
from fedpeft.errors import StorageError
from fedpeft.evaluation import score
from fedpeft.evaluation.report import adapted_from
from fedpeft.models import AdaptedModel, Workbench
from fedpeft.simulation.display import Display
from fedpeft.simulation.plan import embedded_settings
from fedpeft.simulation.run import Simulation, simulate
from fedpeft.storage import write_atomically


@dataclass(frozen=True, slots=True)
class Measured:
    """One model: validation loss (nats per answer token) over all clinics, exact match 0 to 1."""

    model: str
    valid_loss: float
    exact_match: float


def run_demo(out: Path) -> list[Measured]:
    """Run the demo, or go on with it; write ``summary.json`` and ``comparison.json``.

    Raises:
        StorageError: ``out`` cannot be written or holds something else.
    """
    settings = embedded_settings([])
    data = (out / "data").resolve()
    clinics = write_federation(data)
    runs = {
        **{f"{clinic.name} alone": _alone(settings, clinic) for clinic in clinics},
        "federated": settings,
        "pooled": _pooled(settings, clinics, data),
    }
    display = Display()
    people.print(
        f"{len(runs)} models are trained, one after the other; 3 to 4 minutes on two idle cores"
    )
    for name, run in runs.items():
        where = out if name == "federated" else out / "compared" / name.replace(" ", "-")
        with display.stage(
            name, rounds=run.rounds.count, clinics=len(run.clinic), quiet=name != "federated"
        ) as stage:
            simulate(Simulation(run, data, where), stage, stage.observe, stage.tell)
    adapters: dict[str, Path | None] = {"base model": None}
    for name in runs:
        place = out if name == "federated" else out / "compared" / name.replace(" ", "-")
        adapters[name] = place / "adapter"
    measured = _measure(settings, clinics, adapters)
    _save(out, measured)
    _print(measured, clinics)
    return measured


def _alone(settings: FederationSettings, clinic: DemoClinic) -> FederationSettings:
    """Return the run of one clinic that trains as much as it does in the federation."""
    only = tuple(entry for entry in settings.clinic if entry.name == clinic.name)
    return settings.model_copy(update={"clinic": only, **_by_itself(settings)})


def _by_itself(settings: FederationSettings) -> dict[str, BaseModel]:
    """Return the changes for a run of one clinic, of which there is nothing to sum."""
    return {
        "rounds": settings.rounds.model_copy(update={"minimum_clinics": 1}),
        "aggregation": settings.aggregation.model_copy(update={"confidentiality": "sealed"}),
    }


def _pooled(
    settings: FederationSettings, clinics: Sequence[DemoClinic], data: Path
) -> FederationSettings:
    """Return the run on all records in one place: as many steps, each on all clinics' rows."""
    for part in ("train", "valid"):
        rows = [
            {"messages": [{"role": turn.role, "content": turn.text} for turn in record.turns]}
            for clinic in clinics
            for record in read_records(getattr(clinic, part)).records
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        write_atomically(data / "pooled" / f"{part}.jsonl", text.encode())
    entry = ClinicSettings(
        name="pooled", train=Path("pooled/train.jsonl"), valid=Path("pooled/valid.jsonl")
    )
    size = settings.training.batch_size * len(clinics)
    return settings.model_copy(
        update={
            "clinic": (entry,),
            **_by_itself(settings),
            "training": settings.training.model_copy(update={"batch_size": size}),
        }
    )


def _measure(
    settings: FederationSettings,
    clinics: Sequence[DemoClinic],
    adapters: dict[str, Path | None],
) -> list[Measured]:
    workbench = Workbench()
    measured: list[Measured] = []
    questions: dict[str, list[EncodedExample]] = {}
    for name, adapter in adapters.items():
        model = adapted_from(workbench, settings.model, adapter, relative_to=Path())
        if not questions:
            length = settings.training.max_length
            questions = {
                part: _rows(model, [getattr(clinic, part) for clinic in clinics], length)
                for part in ("valid", "heldout")
            }
        valid, heldout = score(model, questions["valid"]), score(model, questions["heldout"])
        measured.append(Measured(name, _known(valid.loss), _known(heldout.exact_match)))
    return measured


def _rows(model: AdaptedModel, files: Sequence[Path], max_length: int) -> list[EncodedExample]:
    return [
        example
        for path in files
        for example in encode(
            read_records(path), model.base.tokenizer, max_length=max_length
        ).examples
    ]


def _known(value: float | None) -> float:
    return float("nan") if value is None else value


def _save(out: Path, measured: Sequence[Measured]) -> None:
    alone = [found for found in measured if found.model.endswith(" alone")]
    by_name = {found.model: found.exact_match for found in measured}
    path = out / "summary.json"
    try:
        summary = cast("dict[str, Any]", json.loads(path.read_text("utf-8")))
    except (OSError, ValueError):
        raise StorageError(f"{path} cannot be read; remove {out} and run the demo again") from None
    summary["exact_match"] = {
        "base": by_name["base model"],
        "best_single": max(found.exact_match for found in alone),
        "federated": by_name["federated"],
        "pooled": by_name["pooled"],
    }
    comparison = {"schema": 1, "models": [asdict(found) for found in measured]}
    write_atomically(out / "comparison.json", (json.dumps(comparison, indent=2) + "\n").encode())
    write_atomically(path, (json.dumps(summary, indent=2) + "\n").encode())


def _print(measured: Sequence[Measured], clinics: Sequence[DemoClinic]) -> None:
    rows = sum(clinic.train_rows for clinic in clinics)
    people.print(
        f"{len(clinics)} clinics with {rows} training records and facts of their own; each model "
        "was asked the held-out questions of all of them:",
        soft_wrap=True,
    )
    table = Table()
    table.add_column("model")
    table.add_column("validation loss", justify="right")
    table.add_column("exact answers", justify="right")
    for found in measured:
        style = "bold" if found.model == "federated" else None
        table.add_row(
            found.model, f"{found.valid_loss:.3f}", f"{found.exact_match:.1%}", style=style
        )
    people.print(table)
