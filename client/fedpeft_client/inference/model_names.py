"""The names under which programs ask for models: ``base``, ``clinic``, ``clinic@round-7``."""

from dataclasses import dataclass

from fedpeft.errors import UnknownAdapter
from fedpeft_client.inference.catalogue import BASE
from fedpeft_client.inference.engine import Engine


@dataclass(frozen=True)
class ModelNames:
    """Names of one clinic's models."""

    clinic: str

    def version(self, asked: str) -> str | None:
        """Return the engine's name for what was asked; None: the version in use.

        Raises:
            UnknownAdapter: it is not a name of this clinic.
        """
        if asked == BASE:
            return BASE
        clinic, at, version = asked.partition("@")
        if clinic != self.clinic or bool(at) != bool(version) or version == BASE:
            raise UnknownAdapter(f"this server has no model {asked[:100]!r}")
        return version or None

    def shown(self, version: str) -> str:
        """Return the whole name of what answers."""
        return BASE if version == BASE else f"{self.clinic}@{version}"

    def explained(self, error: UnknownAdapter, engine: Engine) -> UnknownAdapter:
        """Return ``error`` with the names that can be asked for instead."""
        return UnknownAdapter(f"{error}: ask for one of {', '.join(self.all(engine))}")

    def all(self, engine: Engine) -> list[str]:
        """Return every name that can be asked for now."""
        versions = [name for name in engine.models() if name != BASE]
        return [BASE, self.clinic, *(self.shown(name) for name in versions)]
