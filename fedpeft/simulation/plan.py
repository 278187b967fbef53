"""Turn a command line into a simulation: a named configuration, or the embedded federation."""

from importlib.resources import files
from pathlib import Path

from fedpeft.config import FederationSettings, load_settings
from fedpeft.demo.clinics import write_federation
from fedpeft.simulation.run import Engine, Simulation
from fedpeft_strategies import require_possible


def plan_simulation(
    federation: Path | None, overrides: list[str], *, engine: Engine, out: Path
) -> Simulation:
    """Read ``federation`` (None: the embedded one, whose files are made in ``out/data``).

    Raises:
        ConfigError: the configuration or an override cannot be used.
    """
    if federation is not None:
        settings = load_settings(FederationSettings, federation, overrides)
        return Simulation(settings, federation.resolve().parent, out, engine)
    settings = embedded_settings(overrides)
    require_possible(settings)  # before a file is written
    write_federation(out / "data")
    return Simulation(settings, (out / "data").resolve(), out, engine)


def embedded_settings(overrides: list[str]) -> FederationSettings:
    """Return the recipe of the embedded federation."""
    recipe = Path(str(files("fedpeft.demo") / "federation.toml"))
    return load_settings(FederationSettings, recipe, overrides)
