"""Makes one run of ``strategies.py``: its settings, its data, its figures on disk.

A run that has left its figures is not made again, and one that was stopped goes on
behind its last finished round. Knows neither tables nor pictures, nor other runs.
"""

import json
import shutil
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from strategies_figures import CEILING, FLOOR, Point, points_of

from fedpeft.config import ClinicSettings, FederationSettings, load_settings
from fedpeft.data import EncodedExample, Record, encode, read_records
from fedpeft.demo.clinics import write_federation
from fedpeft.errors import FedpeftError
from fedpeft.evaluation import Score, score
from fedpeft.evaluation.report import adapted_from
from fedpeft.models import Workbench
from fedpeft.simulation.display import Stage
from fedpeft.simulation.plan import embedded_settings
from fedpeft.simulation.run import Simulation, simulate
from fedpeft.storage import write_atomically
from fedpeft_strategies.registry import STRATEGIES

TEN_CLINICS = Path(__file__).parents[1] / "examples" / "ten-clinics.toml"
EVERY_TRAIN, FIRST_VALID = 5, 30
"""Of the ten clinics' files: every so many-th training row, and the first validation rows."""

RECIPES: dict[str, tuple[str, ...]] = {
    "embedded": (),  # that of the demo
    "clinics": (
        "training.local_steps=4",
        "training.max_length=128",
        "training.schedule=cosine",
        "training.warmup_steps=4",
    ),
}
VARIANTS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "secagg": (),
    "nf4": ("model.quantization=nf4",),
    "dp": (
        "privacy.unit=record",
        "privacy.mechanism=local",
        "privacy.epsilon=8",
        "privacy.exact_losses=true",
        "training.local_steps=4",
        "training.batch_size=64",
        "training.learning_rate=1e-2",
        "training.schedule=constant",
        "training.warmup_steps=0",
    ),
}
OWN: dict[str, tuple[str, ...]] = {
    "fedsvd": ("strategy.name=ffa", "strategy.reorthonormalize=true"),
    "fedprox": ("strategy.name=fedprox", "training.proximal_mu=0.01"),
}
"""Strategies that need more than their name."""
_FIGURES = "figures.json"
NAMES = tuple(
    name for each in STRATEGIES for name in ((each, "fedsvd") if each == "ffa" else (each,))
)


@dataclass(frozen=True)
class Run:
    """One run of a strategy, of all clinics by themselves, or of all rows in one place."""

    name: str
    federation: str
    variant: str
    seed: int
    rounds: int

    def folder(self, work: Path) -> Path:
        """Return where the run lies."""
        return work / self.federation / self.variant / f"{self.name}-{self.seed}-{self.rounds}"


def settings_of(run: Run) -> FederationSettings:
    """Return what the run is of; paths count from :func:`data_of`.

    Raises:
        ConfigError: the settings cannot be used.
    """
    mode = "secagg" if run.variant == "secagg" else "sealed"
    overrides = [*RECIPES[run.federation], *VARIANTS[run.variant]]
    overrides += [f"aggregation.confidentiality={mode}", f"training.seed={run.seed}"]
    overrides += [f"rounds.count={run.rounds}"]
    if run.name not in (FLOOR, CEILING):
        overrides += OWN.get(run.name, (f"strategy.name={run.name}",))
    if run.federation == "embedded":
        return embedded_settings(overrides)
    settings = load_settings(FederationSettings, TEN_CLINICS, overrides)
    base = str((TEN_CLINICS.parent / settings.model.base).resolve())
    entries = tuple(
        ClinicSettings(name=name, train=Path(name, "train.jsonl"), valid=Path(name, "valid.jsonl"))
        for name in (entry.name for entry in settings.clinic)
    )
    model = settings.model.model_copy(update={"base": base})
    return settings.model_copy(update={"clinic": entries, "model": model})


def data_of(federation: str, work: Path) -> Path:
    """Return the folder of a federation's files."""
    return (work / "data" / federation).resolve()


def prepare(federation: str, work: Path) -> None:
    """Write the files of a federation, and beside them all rows in one place.

    Raises:
        FedpeftError: the ten clinics' files cannot be read, or the new ones not be written.
    """
    data = data_of(federation, work)
    if (data / "ready").is_file():
        return
    if federation == "embedded":
        write_federation(data)
    else:
        _write_fewer_rows(data)
    entries = settings_of(Run(FLOOR, federation, "plain", 0, 1)).clinic
    for part in ("train", "valid"):
        files = [data / getattr(entry, part) for entry in entries]
        records = [record for file in files for record in read_records(file).records]
        _write_rows(data / "pooled" / f"{part}.jsonl", map(_chat_row, records))
    write_atomically(data / "ready", b"")


def figures_of(run: Run, work: Path) -> dict[str, Any] | None:
    """Return what a finished run has left; None if it left nothing, or had other settings."""
    figures = run.folder(work) / _FIGURES
    if not figures.is_file():
        return None
    known: dict[str, Any] = json.loads(figures.read_text("utf-8"))
    return known if known["settings"] == settings_of(run).model_dump(mode="json") else None


def perform(run: Run, work: Path) -> dict[str, Any]:
    """Make the run, or read what it left; return its figures.

    Raises:
        FedpeftError: of the kind that says what went wrong.
    """
    folder, settings = run.folder(work), settings_of(run)
    if (known := figures_of(run, work)) is not None:
        return known
    if (folder / _FIGURES).is_file():
        shutil.rmtree(folder)  # of other settings
    began = time.perf_counter()
    data = data_of(run.federation, work)
    make = _alone if run.name == FLOOR else _pooled if run.name == CEILING else _federated
    found = {**asdict(run), **make(run, settings, data, folder)}
    found |= {"seconds": round(time.perf_counter() - began, 1)}
    found |= {"settings": settings.model_dump(mode="json")}
    write_atomically(folder / _FIGURES, (json.dumps(found) + "\n").encode())
    shutil.rmtree(folder / "run")
    return found


def _federated(run: Run, settings: FederationSettings, data: Path, folder: Path) -> dict[str, Any]:
    """Run a strategy, and ask its adapter the held-out questions."""
    out = folder / "run"
    _simulate(Simulation(settings, data, out), folder)
    curve = points_of(_records(out, run.rounds))
    if STRATEGIES[settings.strategy.name].declaration.personal:
        return _figures(curve, None)
    marks = Exam(settings, data).marks(out / "adapter")
    _require_same(marks.point(run.rounds).loss, curve[-1].loss, run)
    return _figures(curve, marks.exact)


def _pooled(run: Run, settings: FederationSettings, data: Path, folder: Path) -> dict[str, Any]:
    """Train on all rows in one place: as many steps, each on as many rows as all clinics' steps."""
    entry = ClinicSettings(
        name="pooled", train=Path("pooled/train.jsonl"), valid=Path("pooled/valid.jsonl")
    )
    size = settings.training.batch_size * len(settings.clinic)
    training = settings.training.model_copy(update={"batch_size": size})
    pooled = _of_clinic(settings, entry).model_copy(update={"training": training})
    _simulate(Simulation(pooled, data, folder / "run"), folder)
    marks = Exam(settings, data).marks(folder / "run" / "adapter")
    return _figures([marks.point(run.rounds)], marks.exact)


def _alone(run: Run, settings: FederationSettings, data: Path, folder: Path) -> dict[str, Any]:
    """Train every clinic by itself, as much as in the federation; figures are means over models.

    ``own_loss`` is that of each model on its own clinic's rows, over all clinics' tokens.
    """
    exam, found, own = Exam(settings, data), list[Marks](), Score()
    for entry in settings.clinic:
        out = folder / "run" / entry.name
        _simulate(Simulation(_of_clinic(settings, entry), data, out), folder)
        found.append(exam.marks(out / "adapter"))
        own += found[-1].valid[entry.name]
    points = [marks.point(run.rounds) for marks in found]
    mean = Point(
        run.rounds,
        0,
        statistics.fmean(point.loss for point in points),
        statistics.fmean(point.worst for point in points),
    )
    shares = [marks.exact for marks in found if marks.exact is not None]
    exact = statistics.fmean(shares) if shares else None
    return {**_figures([mean], exact), "own_loss": own.loss}


@dataclass(frozen=True)
class Marks:
    """How one adapter did on each clinic's validation rows and held-out questions."""

    valid: dict[str, Score]
    heldout: dict[str, Score]

    def point(self, number: int) -> Point:
        """Return loss (nats per answer token, over all clinics) and that of the worst clinic."""
        losses = [_known(each.loss) for each in self.valid.values()]
        return Point(number, 0, _known(sum(self.valid.values(), Score()).loss), max(losses))

    @property
    def exact(self) -> float | None:
        """The share of held-out questions answered exactly; None if there are none."""
        return sum(self.heldout.values(), Score()).exact_match


class Exam:
    """All clinics' validation rows, and held-out questions where a federation has some."""

    def __init__(self, settings: FederationSettings, data: Path) -> None:
        self._settings, self._data = settings, data
        self._workbench = Workbench()
        self._rows: dict[str, dict[str, list[EncodedExample]]] = {}

    def marks(self, adapter: Path) -> Marks:
        """Return how the adapter in a directory does."""
        model = adapted_from(self._workbench, self._settings.model, adapter, relative_to=self._data)
        for part in () if self._rows else ("valid", "heldout"):
            self._rows[part] = {
                entry.name: [
                    example
                    for file in self._files(entry, part)
                    for example in encode(
                        read_records(file),
                        model.base.tokenizer,
                        max_length=self._settings.training.max_length,
                    ).examples
                ]
                for entry in self._settings.clinic
            }
        scores = {
            part: {name: score(model, rows) for name, rows in clinics.items()}
            for part, clinics in self._rows.items()
        }
        return Marks(scores["valid"], scores["heldout"])

    def _files(self, entry: ClinicSettings, part: str) -> Sequence[Path]:
        train = self._data / entry.train
        file = train.with_name(part + train.suffix)
        return [file] if file.is_file() else []


def _simulate(simulation: Simulation, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.txt").open("a", encoding="utf-8") as log:
        progress = Progress(console=Console(file=log), disable=True)
        task = progress.add_task("", total=1)
        stage = Stage(progress, task, simulation.settings.rounds.count, quiet=False)
        simulate(simulation, stage)


def _of_clinic(settings: FederationSettings, entry: ClinicSettings) -> FederationSettings:
    """Return the run of one clinic, of which there is nothing to aggregate."""
    rounds = settings.rounds.model_copy(update={"minimum_clinics": 1})
    return settings.model_copy(update={"clinic": (entry,), "rounds": rounds})


def _records(out: Path, last: int) -> list[dict[str, Any]]:
    places = (out / "rounds" / str(number) / "round.json" for number in range(last + 1))
    return [json.loads(place.read_text("utf-8")) for place in places]


def _figures(curve: Iterable[Point], exact: float | None) -> dict[str, Any]:
    return {"curve": [asdict(point) for point in curve], "exact": exact}


def _require_same(scored: float, reported: float, run: Run) -> None:
    if abs(scored - reported) > 0.01 * reported:
        raise FedpeftError(
            f"the adapter of {run} has a validation loss of {scored:.4f} where its clinics "
            f"reported {reported:.4f}; it is not the one that they have"
        )


def _known(loss: float | None) -> float:
    return float("nan") if loss is None else loss


def _write_fewer_rows(data: Path) -> None:
    for entry in load_settings(FederationSettings, TEN_CLINICS, []).clinic:
        train = read_records(TEN_CLINICS.parent / entry.train).records[::EVERY_TRAIN]
        _write_rows(data / entry.name / "train.jsonl", map(_row, train))
        if entry.valid is not None:
            valid = read_records(TEN_CLINICS.parent / entry.valid).records[:FIRST_VALID]
            _write_rows(data / entry.name / "valid.jsonl", map(_row, valid))


def _write_rows(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    write_atomically(file, "".join(json.dumps(row) + "\n" for row in rows).encode())


def _row(record: Record) -> dict[str, Any]:
    """Return a record as it was: plain text, or turns."""
    if record.text is not None:
        return {"patient_id": record.patient_id, "text": record.text}
    return _chat_row(record)


def _chat_row(record: Record) -> dict[str, Any]:
    """Return a record as turns; of plain text the first line is the question.

    The rows of one file have one layout, and only one of all clinics has plain text.
    """
    turns = [(turn.role, turn.text) for turn in record.turns]
    if record.text is not None:
        question, _, answer = record.text.partition("\n")
        turns = [("user", question), ("assistant", answer or question)]
    messages = [{"role": role, "content": text} for role, text in turns]
    return {"patient_id": record.patient_id, "messages": messages}
