"""Run a whole federation of ``federation.toml`` on this machine, over one of three engines."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedpeft.config import FederationSettings
from fedpeft.errors import ConfigError
from fedpeft.models import adapter_schema, fingerprint, require_fingerprint, resolve_base
from fedpeft.sealing import Identity
from fedpeft.simulation.clinics import simulated_clinics
from fedpeft.simulation.local import run_local
from fedpeft.training import Observer
from fedpeft_client.rounds.clinic import Clinic
from fedpeft_server.rounds.loop import Federation, Watcher
from fedpeft_server.runs.directory import RunDirectory
from fedpeft_strategies import build_strategy

Engine = Literal["local", "flower", "ray"]


@dataclass(frozen=True)
class Simulation:
    """What is to be simulated; paths in ``settings`` count from ``relative_to``."""

    settings: FederationSettings
    relative_to: Path
    out: Path
    engine: Engine = "local"


def simulate(
    simulation: Simulation,
    watcher: Watcher,
    observe: Observer | None = None,
    tell: Callable[[str], None] | None = None,
) -> None:
    """Run the simulation, or go on with it where it stopped; the results are in ``out``.

    ``observe`` is told of single training steps, and ``tell`` what was read from
    the clinics' files, by the ``local`` engine only.

    Raises:
        FedpeftError: of the kind that says what went wrong.
    """
    settings = simulation.settings
    if simulation.engine == "ray" and settings.aggregation.confidentiality == "secagg":
        raise ConfigError(
            "the engine 'ray' moves a clinic from process to process, and the secrets of secure "
            "aggregation stay in one; use --engine local or flower, or simulate without it: "
            "--set aggregation.confidentiality=sealed"
        )
    seeded = settings.privacy is not None and settings.privacy.test_seed is not None
    if seeded and simulation.engine == "flower":
        raise ConfigError(
            "privacy.test_seed is for engines in which clinics are no real boxes, and those of the "
            "engine 'flower' are; use --engine local, or leave the seed out"
        )
    model = resolve_base(settings.model.base, relative_to=simulation.relative_to)
    if settings.model.fingerprint is not None:
        require_fingerprint(fingerprint(model), settings.model.fingerprint, model)
    schema = adapter_schema(model, settings.adapter)
    strategy = build_strategy(settings, schema)
    server = Identity.generate()
    clinics = simulated_clinics(
        settings,
        model,
        server.public,
        relative_to=simulation.relative_to,
        ledgers=simulation.out / "ledgers",
        personal=simulation.out / "personal",
    )
    directory = RunDirectory(simulation.out, settings, engine=simulation.engine)
    federation = Federation(settings, schema, strategy, directory, watcher, server)
    if simulation.engine == "local":
        run_local(federation, clinics, observe, tell)
    else:
        _run_elsewhere(simulation, federation, clinics, server)


def _run_elsewhere(
    simulation: Simulation, federation: Federation, clinics: Sequence[Clinic], server: Identity
) -> None:
    """Hand the federation to an engine that is slow to import, or an extra."""
    if simulation.engine == "flower":
        from fedpeft.simulation.flower import run_flower

        run_flower(federation, clinics, simulation.settings, server, simulation.out)
    else:
        from fedpeft.simulation.ray import run_ray

        run_ray(federation, clinics)
