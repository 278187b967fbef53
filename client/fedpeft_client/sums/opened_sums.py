"""Which sums this clinic has helped to open, so that no restart makes it open one twice.

Two sums of one round over different clinics differ by a single update. The file is written
before the last step of a sum leaves, and never loses a line. It holds no secret, and so it
outlives a change of the box's keys. Must not know how a sum is made.
"""

import json
from pathlib import Path
from typing import Any, Final

from fedpeft.errors import StorageError
from fedpeft.storage import explained, write_atomically

SCHEMA: Final = 1
_Rounds = dict[str, dict[str, list[int]]]


class OpenedSums:
    """Run, kind and round of every opened sum, in the file ``path``; None: in memory."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._in_memory: _Rounds = {}

    def has(self, run: int, kind: str, number: int) -> bool:
        """Say whether the sum of a round was opened.

        Raises:
            StorageError: the file is damaged: then no sum may be begun.
        """
        return number in self._read().get(str(run), {}).get(kind, [])

    def note(self, run: int, kind: str, number: int) -> None:
        """Write down, durably, that the sum of a round is about to be opened.

        Raises:
            StorageError: it cannot be written; the sum must not be opened.
        """
        known = self._read()
        rounds = known.setdefault(str(run), {}).setdefault(kind, [])
        if number not in rounds:
            rounds.append(number)
        if self._path is None:
            self._in_memory = known
            return
        text = json.dumps({"schema": SCHEMA, "opened": known}, separators=(",", ":"))
        write_atomically(self._path, f"{text}\n".encode("ascii"), mode=0o600)

    def _read(self) -> _Rounds:
        if self._path is None:
            return self._in_memory
        with explained("read", self._path):
            try:
                content = self._path.read_bytes()
            except FileNotFoundError:
                return {}
        try:
            document: Any = json.loads(content)
            if document["schema"] != SCHEMA:
                raise ValueError
            return {
                str(run): {str(kind): [int(one) for one in rounds] for kind, rounds in each.items()}
                for run, each in document["opened"].items()
            }
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise StorageError(
                f"{self._path} is damaged or of another release, so this box does not know which "
                "sums it has helped to open: restore the file from the backup; without it, remove "
                "it only after the central site has begun a new run"
            ) from None
