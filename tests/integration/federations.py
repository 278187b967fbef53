"""Small federations for tests of the ``local`` engine: their settings, and runs of them."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedpeft.adapters import AdapterState, load_adapter, load_settings_of, pairs
from fedpeft.config import FederationSettings
from fedpeft.models import adapter_schema
from fedpeft.sealing import Identity
from fedpeft.simulation.clinics import simulated_clinics
from fedpeft.simulation.local import LocalLink
from fedpeft.simulation.run import Simulation, simulate
from fedpeft_client.rounds.app import ClinicDesk, build_client_app
from fedpeft_client.rounds.clinic import Clinic
from fedpeft_client.rounds.work import ClinicWork
from fedpeft_server.link.app import build_server_app
from fedpeft_server.rounds.loop import Federation
from fedpeft_server.runs.directory import RoundRecord, RunDirectory
from fedpeft_strategies import Aggregated, Fold, build_strategy

MAX_LENGTH = 64
_FIRST_NODE = 1000


def rows_of(clinic: int) -> int:
    """How many rows the clinic trains on; no two have as many."""
    return 12 + 4 * clinic


def write_clinic(folder: Path, name: str, clinic: int) -> dict[str, Any]:
    """Write the rows of a clinic, two for each patient, and return its entry."""
    for part, count in (("train", rows_of(clinic)), ("valid", 4)):
        rows = [
            {
                "question": f"{part} {row} at {name}?",
                "answer": f"{row} of {name}.",
                "patient_id": f"{part}-{row // 2}",
            }
            for row in range(count)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}-{part}.jsonl").write_text(text)
    return {"name": name, "train": f"{name}-train.jsonl", "valid": f"{name}-valid.jsonl"}


def federation(
    folder: Path,
    model: Path | str,
    strategy: str = "alternating",
    *,
    mode: str = "sealed",
    clinics: int = 5,
    ranks: Sequence[int] = (),
    training: dict[str, Any] | None = None,
    rounds: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    **tables: Any,
) -> Simulation:
    """Return a simulation of clinics c0, c1, ... with the results in ``folder / "out"``.

    ``settings`` are further ones of the strategy, and ``ranks`` the clinics' largest.
    """
    folder.mkdir(exist_ok=True)
    entries = [write_clinic(folder, f"c{at}", at) for at in range(len(ranks) or clinics)]
    for entry, rank in zip(entries, ranks, strict=False):
        entry["max_rank"] = rank
    steps = {"local_steps": 2, "batch_size": 8, "max_length": MAX_LENGTH, "learning_rate": 5e-3}
    counts = {"count": 3, "minimum_clinics": len(entries), "wait_s": 1, "retries": 1}
    content: dict[str, Any] = {
        "name": "sea",
        "model": {"base": str(model), "dtype": "float32"},
        "adapter": {"rank": 8, "alpha": 16.0},
        "training": {**steps, **(training or {})},
        "rounds": {**counts, **(rounds or {})},
        "strategy": {"name": strategy, **(settings or {})},
        "aggregation": {"confidentiality": mode},
        "clinic": entries,
        **tables,
    }
    made = FederationSettings.model_validate(content)
    return Simulation(made, folder, folder / "out", "local")


class Listener:
    """A watcher that remembers what it was told, and may stop the run like a kill."""

    def __init__(self, stop: tuple[int, str] | None = None) -> None:
        """Stop when clinics are about to be asked for this in round ``stop[0]``."""
        self._stop = stop
        self.repeated: list[str] = []
        self.warnings: list[str] = []
        self.records: list[RoundRecord] = []

    def waiting(self, connected: int, enrolled: int, minimum: int) -> None: ...

    def asked(self, number: int, kind: str, clinics: list[str]) -> None:
        if (number, kind) == self._stop:
            raise KeyboardInterrupt

    def warned(self, sentence: str) -> None:
        self.warnings.append(sentence)

    def round_repeated(self, number: int, why: str) -> None:
        self.repeated.append(why)

    def round_finished(self, record: RoundRecord) -> None:
        self.records.append(record)

    def finished(self, records: list[RoundRecord]) -> None: ...


def run(simulation: Simulation) -> Listener:
    """Run the simulation, or go on with it."""
    listener = Listener()
    simulate(simulation, listener)
    return listener


def adapter_after(simulation: Simulation, number: int) -> AdapterState:
    """The adapter that the run holds after a round, on the unchanged base."""
    settings = simulation.settings
    place = simulation.out / "rounds" / str(number) / "adapter"
    schema = adapter_schema(Path(settings.model.base), settings.adapter)
    return load_adapter(place, schema.of_rank(load_settings_of(place).rank))


@dataclass(frozen=True)
class Added:
    """What the strategy was handed in a round: a change, and its weight in rows."""

    round: int
    change: AdapterState
    weight: float


class _Recording(Fold):
    """The real fold; what it is handed is kept."""

    def __init__(self, fold: Fold, number: int, added: list[Added]) -> None:
        self._fold, self._number, self._added = fold, number, added

    def add(self, change: AdapterState, weight: float) -> None:
        self._added.append(Added(self._number, change, weight))
        self._fold.add(change, weight)

    def result(self) -> Aggregated:
        return self._fold.result()


def _unchanged(clinic: Clinic) -> Clinic:
    return clinic


@dataclass
class Boxes:
    """The federation of a simulation with a box for each clinic, and nothing shared by them.

    ``added`` is what the server's strategy was handed, ``refusals`` are the reasons of
    the clinics that did not answer, in order.
    """

    simulation: Simulation
    change: Callable[[Clinic], Clinic] = _unchanged
    added: list[Added] = field(default_factory=list[Added])
    refusals: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])

    def __post_init__(self) -> None:
        self._server = Identity.generate()
        clinics = simulated_clinics(
            self.simulation.settings,
            Path(self.simulation.settings.model.base),
            self._server.public,
            relative_to=self.simulation.relative_to,
            ledgers=self.simulation.out / "ledgers",
            personal=self.simulation.out / "personal",
        )
        self.clinics = [self.change(clinic) for clinic in clinics]
        self._apps = {clinic.name: _app_of(clinic) for clinic in self.clinics}

    def restart(self, name: str) -> None:
        """Start a clinic's program anew: what it held in memory is gone."""
        (clinic,) = (clinic for clinic in self.clinics if clinic.name == name)
        self._apps[name] = _app_of(clinic)

    def run(self, listener: Listener) -> None:
        """Run all rounds."""
        settings = self.simulation.settings
        schema = adapter_schema(Path(settings.model.base), settings.adapter)
        strategy = build_strategy(settings, schema)
        fold = strategy.fold
        strategy.fold = lambda number, adapter: _Recording(
            fold(number, adapter), number, self.added
        )
        directory = RunDirectory(self.simulation.out, settings, engine="local")
        federation = Federation(settings, schema, strategy, directory, listener, self._server)
        link = LocalLink(cast("ClientApp", self._answer), self.clinics)
        link.run(build_server_app(federation, link))

    def _answer(self, message: Message, context: Context) -> Message:
        name = self.clinics[context.node_id - _FIRST_NODE].name
        reply = self._apps[name](message, context)
        if reply.has_error():
            self.refusals.append((name, reply.error.reason or ""))
        return reply


def _app_of(clinic: Clinic) -> ClientApp:
    return build_client_app(ClinicDesk(lambda _context: clinic, ClinicWork()))


def product_distance(one: AdapterState, other: AdapterState) -> float:
    """The Frobenius norm of the difference of the products BA of all modules."""
    products = [[b.double() @ a.double() for b, a in pairs(state)] for state in (one, other)]
    return math.sqrt(
        sum(float((left - right).square().sum()) for left, right in zip(*products, strict=True))
    )
