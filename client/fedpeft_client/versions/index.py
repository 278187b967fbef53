"""What ``index.json`` of the adapter store says: what is in use, what is pinned, who is who.

Knows no folders of versions; whoever changes it holds the store's lock.
"""

from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedpeft.errors import StorageError
from fedpeft.storage import write_atomically
from fedpeft_client.inference.catalogue import BASE

INDEX_FILE: Final = "index.json"
_REMEMBERED: Final = 100
"""How many changes of what is in use can be rolled back."""


class Index(BaseModel):
    """The content of the file (schema 1).

    The last of ``history`` is in use, what stands before it was used before. ``given``
    holds every name that was ever given, in order, and the identity that it was given to.
    """

    model_config = ConfigDict(extra="forbid", populate_by_name=True)
    layout: Literal[1] = Field(default=1, alias="schema")
    history: list[str] = Field(default=[BASE], min_length=1)
    pinned: list[str] = []
    given: dict[str, str] = {}

    @property
    def in_use(self) -> str:
        """The name of the version in use, or ``base``."""
        return self.history[-1]

    def put_to_use(self, name: str) -> None:
        """Note that ``name`` is used from now on."""
        if self.in_use != name:
            self.history = [*self.history, name][-_REMEMBERED:]

    def forget(self, name: str) -> None:
        """Take a version out of everything but the names that were given."""
        left = [one for one in self.history if one != name] or [BASE]
        self.history = [one for at, one in enumerate(left) if at == 0 or left[at - 1] != one]
        self.pinned = [one for one in self.pinned if one != name]


def read_index(directory: Path) -> Index:
    """Return the index in ``directory``, that of an empty store if there is none.

    Raises:
        StorageError: it is damaged.
    """
    path = directory / INDEX_FILE
    try:
        return Index.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return Index()
    except (OSError, ValidationError):
        raise StorageError(
            f"{path} cannot be read, so it is unknown which adapter is in use: restore it from a "
            "backup, or remove it and choose one with `fedpeft-client adapters use`"
        ) from None


def write_index(directory: Path, index: Index) -> None:
    """Replace the index in ``directory``.

    Raises:
        StorageError: it cannot be written.
    """
    text = index.model_dump_json(indent=2, by_alias=True)
    write_atomically(directory / INDEX_FILE, (text + "\n").encode(), mode=0o600)
