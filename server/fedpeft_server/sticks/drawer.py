"""What waits for one clinic on the stick, and what became of what it was asked before.

A folder: an index, the file of the question that is open, and answers that may be needed
again. The server and the commands beside it use it at once, each holding its lock. Must not
know Flower, nor what a question is about.
"""

import json
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

from fedpeft.errors import SealingError, StorageError
from fedpeft.file_lock import exclusive
from fedpeft.sealing import Context
from fedpeft.storage import explained, write_atomically

SCHEMA: Final = 1
_INDEX: Final = "index.json"
_LOCK: Final = "lock"
_PRIVATE_FILE: Final = 0o600
_PRIVATE_FOLDER: Final = 0o700
_REMEMBERED: Final = 1000
"""Questions whose fate is told; older ones count as unknown, which is refused as well."""

Fate = Literal["open", "arrived", "taken", "declined", "withdrawn", "void"]
"""Waits for an answer; has one; it was counted; it was a no; the time ran out; another took its
place."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One question by the SHA-256 of its sealed bytes.

    ``words`` tells questions apart by what they ask: one with the same words is the same,
    also after a restart of the server; empty: it is never asked twice. ``keep`` says that
    its answer may be handed out again.
    """

    id: str
    place: Context
    words: str = ""
    keep: bool = False
    fate: Fate = "open"

    @property
    def is_standing(self) -> bool:
        """Whether an answer to it may still be used, or used again."""
        return self.fate in ("open", "arrived") or (self.fate == "taken" and self.keep)


class Drawer:
    """The folder of one clinic; changes only inside of :meth:`locked`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.asked: list[Asked] = []

    @contextmanager
    def locked(self) -> Generator["Drawer"]:
        """Hold the folder, which is made if it is missing, and read its index.

        Raises:
            StorageError: it cannot be used, or its index is damaged.
        """
        with explained("make", self._directory):
            self._directory.mkdir(mode=_PRIVATE_FOLDER, parents=True, exist_ok=True)
        with exclusive(self._directory / _LOCK):
            self._read()
            yield self

    def find(self, question: str) -> Asked | None:
        """Return the question of this id."""
        return next((each for each in self.asked if each.id == question), None)

    def open_question(self) -> Asked | None:
        """Return the question that waits for an answer."""
        return next((each for each in self.asked if each.fate == "open"), None)

    def standing(self, words: str) -> Asked | None:
        """Return the question of these words whose answer may be used."""
        found = (each for each in self.asked if each.words == words and each.is_standing)
        return next(found, None) if words else None

    def add(self, asked: Asked, question: bytes) -> None:
        """Open a question; those before it that have no answer yet are void.

        Raises:
            StorageError: the disk is full.
        """
        for each in self.asked:
            if each.fate in ("open", "arrived"):
                self.note(each, "void")
            elif each.keep and each.place.round < asked.place.round:
                self._remove(_answer_of(each))
        write_atomically(self._directory / _question_of(asked), question, mode=_PRIVATE_FILE)
        self.asked = [*self.asked, asked][-_REMEMBERED:]
        self._write()

    def note(self, asked: Asked, fate: Fate) -> None:
        """Write down what became of a question, and remove the files that it needs no more.

        Raises:
            StorageError: it cannot be written.
        """
        changed = replace(asked, fate=fate)
        self.asked = [changed if each.id == asked.id else each for each in self.asked]
        self._write()
        if fate != "open":
            self._remove(_question_of(asked))
        if not changed.is_standing:
            self._remove(_answer_of(asked))

    def question(self, asked: Asked) -> bytes:
        """Return the file of a question that is open.

        Raises:
            StorageError: it cannot be read.
        """
        path = self._directory / _question_of(asked)
        with explained("read", path):
            return path.read_bytes()

    def answer(self, asked: Asked) -> bytes | None:
        """Return the file that answers a question; None: it was removed.

        Raises:
            StorageError: it cannot be read.
        """
        path = self._directory / _answer_of(asked)
        with explained("read", path):
            return path.read_bytes() if path.exists() else None

    def arrive(self, asked: Asked, answer: bytes) -> None:
        """Keep the answer to an open question, durably.

        Raises:
            StorageError: it cannot be written; the question stays open.
        """
        write_atomically(self._directory / _answer_of(asked), answer, mode=_PRIVATE_FILE)
        self.note(asked, "arrived")

    def _remove(self, name: str) -> None:
        path = self._directory / name
        with explained("remove", path):
            path.unlink(missing_ok=True)

    def _read(self) -> None:
        path = self._directory / _INDEX
        with explained("read", path):
            content = path.read_bytes() if path.exists() else b""
        try:
            document: Any = json.loads(content) if content else {"schema": SCHEMA, "asked": []}
            if document["schema"] != SCHEMA:
                raise ValueError
            self.asked = [_asked(entry) for entry in document["asked"]]
        except (ValueError, KeyError, TypeError, SealingError):
            raise StorageError(
                f"{path} is damaged or of another release: restore it from the backup, or remove "
                "its folder, and this clinic is asked anew"
            ) from None

    def _write(self) -> None:
        entries = [{**asdict(each), "place": each.place.to_bytes().hex()} for each in self.asked]
        text = json.dumps({"schema": SCHEMA, "asked": entries})
        write_atomically(self._directory / _INDEX, text.encode(), mode=_PRIVATE_FILE)


def _asked(entry: dict[str, Any]) -> Asked:
    place = Context.from_bytes(bytes.fromhex(entry["place"]))
    return replace(Asked(id="", place=place), **{**entry, "place": place})


def _question_of(asked: Asked) -> str:
    return f"{asked.id}.question"


def _answer_of(asked: Asked) -> str:
    return f"{asked.id}.answer"
