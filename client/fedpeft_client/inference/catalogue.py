"""Which adapters a box has, by name, and which of them is in use: all that an engine must know.

Must not know where the box keeps them, how they came, or whether they are good.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeAlias

BASE: Final = "base"
"""The name of the base model without an adapter; every engine has it."""


@dataclass(frozen=True, kw_only=True)
class Catalogue:
    """The versions of the adapter on this box, as they are at one moment.

    ``adapters`` maps a version's name ("round-7") to its stock PEFT directory, which
    never changes once it is named here. ``default`` is the one in use; None: the base.
    """

    default: str | None = None
    adapters: Mapping[str, Path] = field(default_factory=dict[str, Path])

    def __post_init__(self) -> None:
        if BASE in self.adapters:
            raise ValueError(f"an adapter cannot be called {BASE!r}: that is the bare base model")
        if self.default is not None and self.default not in self.adapters:
            raise ValueError(f"the adapter in use, {self.default!r}, is not among the adapters")


Look: TypeAlias = Callable[[], Catalogue]
"""Reads the catalogue anew. An engine calls it every second and when it is told to refresh."""
