"""The checkpoints of a clinic's round, and its finished answer, so that a kill costs a minute.

A round that is asked for again goes on from the newest good checkpoint, or is answered
with what it had answered before. Losing one of these files costs work, never a round: what
is wrong with them is said once and the round goes on. One thing is insisted on: **keys of
noise are gone before the noisy answer leaves**, as they would take the noise off again.
"""

import json
import secrets
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from fedpeft.adapters import AdapterSchema
from fedpeft.errors import StorageError
from fedpeft.protocol import Job
from fedpeft.storage import explained
from fedpeft.training import Checkpoint
from fedpeft_client.rounds.clinic import Clinic
from fedpeft_client.rounds.learning import Trained
from fedpeft_client.rounds.undertaking import Undertaking, differences
from fedpeft_client.vault import LARGEST, Vault

SCHEMA: Final = 1
ANSWER: Final = "answer.checkpoint"
_TRAINING: Final = "training-"
_SUFFIX: Final = ".checkpoint"
_LENGTH_BYTES: Final = 8
_ATTEMPT_BYTES: Final = 32
_REST: Final = 49.0
"""Training lasts so many times as long as writing the checkpoint before took: 2 % in all."""

Tell = Callable[[str], None]
Kind = Literal["training", "answer"]


@dataclass(frozen=True, slots=True)
class _Entry:
    """What one file holds; ``attempt`` is the one that its steps are charged for."""

    kind: Kind
    attempt: str
    work: Undertaking
    content: bytes = field(repr=False)

    def to_bytes(self) -> bytes:
        about = {"schema": SCHEMA, "kind": self.kind, "attempt": self.attempt, "work": self.work}
        text = json.dumps(about, sort_keys=True).encode()
        return len(text).to_bytes(_LENGTH_BYTES) + text + self.content

    @classmethod
    def from_bytes(cls, data: bytes) -> "_Entry":
        length = int.from_bytes(data[:_LENGTH_BYTES])
        about: dict[str, Any] = json.loads(data[_LENGTH_BYTES : _LENGTH_BYTES + length])
        if about["schema"] != SCHEMA:
            raise StorageError(f"a checkpoint has format {about['schema']}, not {SCHEMA}")
        content = data[_LENGTH_BYTES + length :]
        return cls(about["kind"], about["attempt"], about["work"], content)


class CheckpointFolder:
    """The checkpoints of ``clinic``, which must have a folder for them; ``tell`` hears troubles."""

    def __init__(self, clinic: Clinic, tell: Tell | None = None) -> None:
        if clinic.checkpoint_directory is None:
            raise ValueError("this clinic keeps no checkpoints")
        self.vault: Final = Vault(clinic.checkpoint_directory, clinic.membership.identity)
        self.settings: Final = clinic.checkpoints
        self.spared_bytes: Final = clinic.limits.min_free_disk_mb << 20
        self._name = clinic.name
        self._tell = tell

    def tell(self, sentence: str) -> None:
        """Say something to the people at this clinic."""
        if self._tell is not None:
            self._tell(f"{self._name}: {sentence}")

    def open(self, work: Undertaking) -> "KeptRound":
        """Return what is kept of ``work``; what belongs to other work is removed, and that said."""
        try:
            found = self._files(work)
        except StorageError as error:
            self.tell(f"no checkpoint can be read: {error}")
            found = {}
        return KeptRound(self, work, found)

    def clear(self) -> None:
        """Remove everything: the round is over.

        Raises:
            StorageError: the disk is read-only.
        """
        for name in self.vault.names():
            self.vault.remove(name)

    def training(self) -> list[str]:
        """Return the names of a round's checkpoints, the newest first."""
        return [name for name in reversed(self.vault.names()) if name.startswith(_TRAINING)]

    def _files(self, work: Undertaking) -> dict[Kind, _Entry]:
        """Return the answer to ``work`` and its newest checkpoint, where they are there and good.

        Older checkpoints of the same work stay. All the rest is removed.
        """
        found: dict[Kind, _Entry] = {}
        foreign: list[str] = []
        kept = [ANSWER] if ANSWER in self.vault.names() else []
        for name in (*kept, *self.training()):
            entry = self._entry(name)
            if entry is None:
                continue
            if others := differences(entry.work, work):
                foreign = foreign or others
                self.vault.remove(name)
            else:
                found.setdefault(entry.kind, entry)
                if entry.kind == "training":
                    break
        self._remove_unfinished()
        if foreign:
            self.tell(
                "checkpoints of before were removed, as they belong to another round than the "
                f"server asks for now (other {', '.join(foreign)})"
            )
        return found

    def _entry(self, name: str) -> _Entry | None:
        """Return what a file holds; one that is damaged is removed, and that said."""
        try:
            entry = _Entry.from_bytes(self.vault.read(name))
            if entry.kind == "training":
                Checkpoint.from_bytes(entry.content)
            return entry
        except (StorageError, ValueError, KeyError) as error:
            why = error if isinstance(error, StorageError) else f"{name} is unreadable"
            self.tell(f"a checkpoint was removed: {why}; the one before is used, if there is one")
            self.vault.remove(name)
            return None

    def _remove_unfinished(self) -> None:
        """Remove what a kill in the midst of writing left."""
        for name in self.vault.names():
            if name != ANSWER and not name.startswith(_TRAINING):
                self.vault.remove(name)


class KeptRound:
    """What is kept of one round; a :class:`fedpeft.training.Checkpoints`.

    ``attempt`` names the stream of samples and noise that its steps are charged for. It is
    that of the checkpoint, if there is one, as with other keys the steps are not paid for.
    """

    def __init__(
        self, folder: CheckpointFolder, work: Undertaking, found: dict[Kind, _Entry]
    ) -> None:
        self._folder, self._work = folder, work
        stopped, answer = found.get("training"), found.get("answer")
        self.attempt: Final = stopped.attempt if stopped else secrets.token_hex(_ATTEMPT_BYTES)
        self._newest = None if stopped is None else Checkpoint.from_bytes(stopped.content)
        self._answer = None if answer is None else answer.content
        self._due_at = 0.0
        self._told = False
        if self._newest is not None and answer is None:
            folder.tell(
                f"round {work['round']} was stopped, and goes on after step "
                f"{self._newest.totals.steps}, of which there is a checkpoint"
            )

    def newest(self) -> Checkpoint | None:
        """Return where the round was stopped; None: it begins."""
        return self._newest

    def offer(self, step: int, take: Callable[[], Checkpoint]) -> None:
        """Keep what ``take`` returns, if it is time for it. A full disk does not stop a round."""
        if step and time.monotonic() < self._due_at:
            return
        began = time.monotonic()
        if step:
            self._newest = None  # Three times the adapter, of which nobody has need any more.
        try:
            self._write(f"{_TRAINING}{step:08}{_SUFFIX}", "training", take().to_bytes())
            self._prune()
        except StorageError as error:
            self._mention(f"this round goes on without a checkpoint: {error}")
        self._rest(time.monotonic() - began)

    def answered(self, schema: AdapterSchema) -> Trained | None:
        """Return what the round was answered with before, an update under ``schema``.

        Raises:
            StorageError: as :meth:`finish`.
        """
        if self._answer is None:
            return None
        try:
            trained = Trained.from_bytes(self._answer, schema)
        except StorageError as error:
            self._mention(f"the answer of before is not used: {error}")
            return None
        self._remove_training(secret=trained.privacy is not None)
        self._folder.tell(
            f"round {self._work['round']} was trained already, and is answered with the same update"
        )
        return trained

    def finish(self, trained: Trained, job: Job) -> None:
        """Keep ``trained`` for when it is asked for again, and remove the round's checkpoints.

        To be called before it leaves. Where the noise is the server's, nothing is kept: each
        time that the update is sent there is noise anew, and must be charged.

        Raises:
            StorageError: a checkpoint that holds keys of noise cannot be removed; the update
                must not leave.
        """
        if job.privacy is None or job.privacy.mechanism != "central":
            try:
                self._write(ANSWER, "answer", trained.to_bytes())
            except StorageError as error:
                self._mention(f"this round's answer is not kept for a restart: {error}")
        self._remove_training(secret=trained.privacy is not None)

    def _remove_training(self, *, secret: bool) -> None:
        try:
            for name in self._folder.training():
                self._folder.vault.remove(name)
        except StorageError as error:
            if secret:
                raise StorageError(
                    "the key of this round's noise is still on the disk, so the update does not "
                    f"leave this box: {error}"
                ) from error
            self._mention(f"a checkpoint is left over: {error}")

    def _write(self, name: str, kind: Kind, content: bytes) -> None:
        folder = self._folder
        data = _Entry(kind, self.attempt, self._work, content).to_bytes()
        directory = folder.vault.directory
        if len(data) > min(folder.settings.max_mb << 20, LARGEST):
            raise StorageError(
                f"it takes {len(data) >> 20} MiB where checkpoints.max_mb = "
                f"{folder.settings.max_mb} in client.toml; raise that to keep it"
            )
        with explained("look at", directory):
            there = next(each for each in (directory, *directory.parents) if each.exists())
            free = shutil.disk_usage(there).free
        if free - len(data) < folder.spared_bytes:
            raise StorageError(
                f"{free >> 20} MiB are free in {directory} where limits.min_free_disk_mb = "
                f"{folder.spared_bytes >> 20} in client.toml; free some space or lower that limit"
            )
        folder.vault.write(name, data)

    def _prune(self) -> None:
        """Remove the oldest checkpoints beyond the number and the bytes that are allowed."""
        vault, settings = self._folder.vault, self._folder.settings
        total = 0
        for place, name in enumerate(self._folder.training()):
            total += vault.size(name)
            if place and (place >= settings.keep or total > settings.max_mb << 20):
                vault.remove(name)

    def _rest(self, cost_s: float) -> None:
        pause = max(self._folder.settings.every_s, _REST * cost_s)
        self._due_at = time.monotonic() + pause

    def _mention(self, sentence: str) -> None:
        if not self._told:
            self._folder.tell(sentence)
        self._told = True
