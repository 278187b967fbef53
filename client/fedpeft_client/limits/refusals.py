"""The last order that a rule of this clinic forbade, for the people who look after the box.

The sentence is the one of the log; the server was told the rule's name alone.
"""

import datetime
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fedpeft.errors import StorageError
from fedpeft.storage import write_atomically

SCHEMA: Final = 1
_LOG: Final = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """``rule`` is what the server was told, ``sentence`` all there is to know of it here."""

    time: str
    rule: str
    sentence: str


class RefusalFile:
    """One small JSON file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def note(self, rule: str, sentence: str) -> None:
        """Keep a refusal. That it cannot be kept is logged, and does not undo it."""
        content = {
            "schema": SCHEMA,
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "rule": rule,
            "sentence": sentence,
        }
        try:
            data = (json.dumps(content, indent=2) + "\n").encode()
            write_atomically(self._path, data, mode=0o600)
        except StorageError as error:
            _LOG.warning("%s", error)

    def read(self) -> Refusal | None:
        """Return the last refusal; None if there was none.

        Raises:
            StorageError: the file is damaged.
        """
        try:
            content: Any = json.loads(self._path.read_bytes())
            time, rule, sentence = (str(content[key]) for key in ("time", "rule", "sentence"))
            return Refusal(time=time, rule=rule, sentence=sentence)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            raise StorageError(
                f"{self._path} cannot be read: remove it, the next refusal writes it anew"
            ) from None
