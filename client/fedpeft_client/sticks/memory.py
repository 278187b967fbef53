"""What a box without a network remembers from one stick to the next.

How far each run has come, the adapter that it holds, and its last answer: all that a
running client keeps in memory. Encrypted like a checkpoint. Must not know what is asked.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from fedpeft.errors import AdapterError, SealingError, StickRefused, StorageError
from fedpeft.protocol.parcel import Held, opened, whole
from fedpeft.sealing import Identity
from fedpeft_client.rounds.clinic import Clinic
from fedpeft_client.rounds.mailbox import Place, Places, Request
from fedpeft_client.rounds.shelf import Shelf
from fedpeft_client.vault import Vault

SCHEMA: Final = 1
_DIARY: Final = "diary"
_HELD: Final = "held"
_ANSWER: Final = "answer"
_HASH: Final = 64
"""Characters of a SHA-256, which stands before what it tells apart."""


@dataclass
class _Diary:
    """``places`` by run, the present run last; ``answered`` are questions, the last one last."""

    places: dict[int, Place] = field(default_factory=dict[int, Place])
    answered: list[str] = field(default_factory=list[str])

    def to_bytes(self) -> bytes:
        places = [[str(run), *place] for run, place in self.places.items()]
        return json.dumps({"schema": SCHEMA, "places": places, "answered": self.answered}).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> "_Diary":
        document: Any = json.loads(data)
        if document["schema"] != SCHEMA:
            raise ValueError
        places = {int(run): (number, kind, at) for run, number, kind, at in document["places"]}
        return cls(places, document["answered"])


class StickMemory:
    """The memory of the box in ``directory``, in its folder ``sticks``."""

    def __init__(self, directory: Path, identity: Identity) -> None:
        """Read it.

        Raises:
            StorageError: it is damaged, or of another identity or release.
        """
        self.vault: Final = Vault(directory / "sticks", identity)
        self._diary = _Diary()
        if _DIARY in self.vault.names():
            try:
                self._diary = _Diary.from_bytes(self.vault.read(_DIARY))
            except (ValueError, KeyError, TypeError):
                raise StorageError(
                    f"{self.vault.directory / _DIARY} is of another release: finish the round with "
                    "the release that wrote it, or remove the folder after the round's end"
                ) from None

    def answer_to(self, question: str, run: int) -> bytes | None:
        """Return the file with which ``question`` was answered before; None: it was not.

        Raises:
            StickRefused: it was, or its run was left, before what this box did last.
            StorageError: the answer cannot be read.
        """
        if _ANSWER in self.vault.names():
            kept = self.vault.read(_ANSWER)
            if kept[:_HASH] == question.encode("ascii"):
                return kept[_HASH:]
        runs = list(self._diary.places)
        if question in self._diary.answered or (run in runs and run != runs[-1]):
            raise StickRefused(
                "is old: this box has answered it, or was asked something later since; bring the "
                "newest file of the central site"
            )
        return None

    def keep_answer(self, question: str, answer: bytes) -> None:
        """Remember the file with which ``question`` is answered.

        Raises:
            StorageError: it cannot be written; the answer must not leave.
        """
        # In this order: a question counts as answered once its answer is there.
        self.vault.write(_ANSWER, question.encode("ascii") + answer)
        self._diary.answered.append(question)
        self._write()

    @property
    def latest(self) -> Place | None:
        """How far the present run has come; None: nothing was asked yet."""
        return next(reversed(self._diary.places.values()), None)

    def place(self, run: int) -> Place | None:
        """Return how far ``run`` has come."""
        return self._diary.places.get(run)

    def advance(self, run: int, place: Place) -> None:
        """Remember how far ``run`` has come, and that it is the present one.

        Raises:
            StorageError: it cannot be written.
        """
        self._diary.places.pop(run, None)
        self._diary.places[run] = place
        self._write()

    def _write(self) -> None:
        self.vault.write(_DIARY, self._diary.to_bytes())


class KeptPlaces(Places):
    """How far each run has come, kept in ``memory``."""

    def __init__(self, memory: StickMemory) -> None:
        super().__init__()
        self._memory = memory

    def latest(self, clinic: Clinic, run: int) -> Place | None:
        """Return the place of the latest message that opened, in whichever process."""
        return self._memory.place(run)

    def advance(self, clinic: Clinic, run: int, place: Place) -> None:
        """Remember, durably, that a message of ``place`` has opened."""
        self._memory.advance(run, place)


class KeptShelf(Shelf):
    """The adapter that the box was sent last, kept in ``memory``."""

    def __init__(self, memory: StickMemory) -> None:
        super().__init__()
        self._memory = memory
        self._looked = False

    def take(self, clinic: Clinic, request: Request) -> Held:
        """Return the adapter that a request is about, and keep it.

        Raises:
            AdapterNotHeld, SealingError: see :meth:`Shelf.take`.
            StorageError: it cannot be written.
        """
        if not self._looked:
            self._looked = True
            if (held := self._kept()) is not None:
                self._held[clinic.name] = held
        return super().take(clinic, request)

    def _kept(self) -> Held | None:
        """Return what is kept; what cannot be read counts as lost, and comes whole."""
        vault = self._memory.vault
        if _HELD not in vault.names():
            return None
        try:
            data = vault.read(_HELD)
            return opened(data[_HASH:], None, data[:_HASH].decode("ascii"))
        except (StorageError, SealingError, AdapterError, ValueError):
            return None

    def _keep(self, clinic: Clinic, held: Held) -> None:
        super()._keep(clinic, held)
        self._memory.vault.write(_HELD, held.digest.encode("ascii") + whole(held))
