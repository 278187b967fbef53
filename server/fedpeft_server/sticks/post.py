"""The post of all clinics on the stick: what the server asks them, and what they answered.

A folder beside the server's databases, which outlives the server. A question that nobody has
answered stays the same question when a server that was started anew asks it in the same
words; then the answer on the stick fits it. A step of a secure sum is never the same, as
its keys are gone with the server that asked. Must not know Flower.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Final

from fedpeft.errors import StickRefused
from fedpeft.protocol import CONTENT_KEY, JOB, KINDS, Job, Payload
from fedpeft.protocol.lineage import LINEAGE
from fedpeft.protocol.stick_file import ReadFile, StickFile, parse_stick_file, question_file
from fedpeft.sealing import Context, Identity, PublicIdentity
from fedpeft_server.rounds.asking import Asking
from fedpeft_server.sticks.drawer import Asked, Drawer

FOLDER: Final = "sticks"
_Words = tuple[str, bool]
_WHY: Final = {
    "arrived": "was imported already, and counts once",
    "taken": "was imported already, and counts once",
    "declined": "comes after the box said no to that question, which counted: export when the "
    "server asks again, and bring the box that file",
    "withdrawn": "came too late: its round did not wait any longer (rounds.stick_timeout_s)",
    "void": "answers a question that was asked anew since, as after a restart of the server in "
    "the midst of a secure sum: export again, and bring the box that file",
}


class StickPost(Asking):
    """The questions and answers under ``directory``."""

    def __init__(
        self,
        directory: Path,
        *,
        signer: Identity | None = None,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        """Use the folder.

        Args:
            directory: of the server's state.
            signer: the server's identity, which signs questions; a command needs none.
            tell: hears the name of a clinic for which a question was laid out.
        """
        self._directory = directory / FOLDER
        self._signer = signer
        self._tell = tell
        self._words: dict[tuple[str, Context], _Words] = {}

    def begin(self) -> None:
        """Make void, at the start of a server, what no answer can be used for any more.

        Raises:
            StorageError: the folder cannot be used.
        """
        for name in self._names():
            with self._drawer(name).locked() as drawer:
                for asked in drawer.asked:
                    if asked.fate in ("open", "arrived") and not asked.words:
                        drawer.note(asked, "void")

    def place(self, clinic: str, fresh: Context, payload: Payload) -> Context:
        """Return where ``clinic`` is asked, see :class:`Asking`."""
        words, keep = _words(fresh, payload)
        place = fresh
        if words and (self._directory / clinic).is_dir():
            with self._drawer(clinic).locked() as drawer:
                if (standing := drawer.standing(words)) is not None:
                    place = standing.place
        self._words[clinic, place] = words, keep
        return place

    def unusable(self, clinic: str, place: Context) -> None:
        """Do not hand out the answer at ``place`` again."""
        if not (self._directory / clinic).is_dir():
            return
        with self._drawer(clinic).locked() as drawer:
            for asked in drawer.asked:
                if asked.place == place and asked.is_standing:
                    drawer.note(asked, "void")

    def ask(self, clinic: str, sealed: bytes, broadcast: bytes | None) -> str:
        """Lay a question out for ``clinic``, unless it lies there already.

        Returns:
            Its id, under which :meth:`take` finds the answer.

        Raises:
            StorageError: it cannot be written.
        """
        if self._signer is None:
            raise ValueError("a question must be signed")
        question = question_file(sealed, broadcast)
        words, keep = self._words.pop((clinic, question.context), ("", False))
        with self._drawer(clinic).locked() as drawer:
            standing = drawer.standing(words)
            if standing is not None and standing.place == question.context:
                if standing.fate == "taken":
                    drawer.note(standing, "arrived")
                asked = standing
            else:
                asked = Asked(id=question.question, place=question.context, words=words, keep=keep)
                drawer.add(asked, question.to_bytes(self._signer))
        if asked.fate == "open" and self._tell is not None:
            self._tell(clinic)
        return asked.id

    def take(self, clinic: str, question: str) -> StickFile | None:
        """Return the answer to a question once, if it has come.

        Raises:
            StorageError: it cannot be read.
        """
        with self._drawer(clinic).locked() as drawer:
            asked = drawer.find(question)
            if asked is None or asked.fate != "arrived":
                return None
            content = drawer.answer(asked)
            if content is None:
                return None
            found = parse_stick_file(content).file
            # Of a refusal nothing is kept: the box is asked again, and may have thought it over.
            drawer.note(asked, "declined" if found.reason else "taken")
            return found

    def withdraw(self, clinic: str, question: str) -> None:
        """Wait no longer for the answer to a question.

        Raises:
            StorageError: it cannot be written.
        """
        with self._drawer(clinic).locked() as drawer:
            asked = drawer.find(question)
            if asked is not None and asked.fate == "open":
                drawer.note(asked, "withdrawn")

    def waiting(self) -> dict[str, tuple[StickFile, bytes]]:
        """Return by clinic the question that waits for it, as a file's content and bytes.

        Raises:
            StorageError: the folder cannot be read.
        """
        found: dict[str, tuple[StickFile, bytes]] = {}
        for name in self._names():
            with self._drawer(name).locked() as drawer:
                if (asked := drawer.open_question()) is not None:
                    content = drawer.question(asked)
                    found[name] = parse_stick_file(content).file, content
        return found

    def answered(self) -> list[str]:
        """Return the clinics whose answer to the last question has come, by name.

        Raises:
            StorageError: the folder cannot be read.
        """
        found: list[str] = []
        for name in self._names():
            with self._drawer(name).locked() as drawer:
                if drawer.asked and drawer.asked[-1].fate in ("arrived", "taken", "declined"):
                    found.append(name)
        return found

    def deliver(self, read: ReadFile, sender: PublicIdentity) -> StickFile:
        """Put an answer where the server finds it; ``sender`` is the clinic's known identity.

        Raises:
            StickRefused: it was not asked for, came already, too late, or from somebody else; of
                the sentence only what comes after the file's name.
            StorageError: it cannot be written.
        """
        answer = read.file
        with self._drawer(answer.clinic).locked() as drawer:
            asked = drawer.find(answer.question)
            if asked is None or asked.place != answer.context:
                raise StickRefused(
                    f"is old or foreign: this server did not ask clinic {answer.clinic} that, or "
                    "it was long ago; bring the box the newest file of round export"
                )
            read.signed_by(sender, source=f"clinic {answer.clinic}")
            if asked.fate != "open":
                raise StickRefused(_WHY[asked.fate])
            drawer.arrive(asked, read.content)
        return answer

    def _names(self) -> list[str]:
        if not self._directory.is_dir():
            return []
        return sorted(path.name for path in self._directory.iterdir() if path.is_dir())

    def _drawer(self, clinic: str) -> Drawer:
        return Drawer(self._directory / clinic)


def _words(place: Context, payload: Payload) -> _Words:
    """Return what a question asks, in a hash, and whether its answer may be used twice.

    Where the noise is the server's, each use of an answer is one that was not paid for.
    """
    if place.purpose not in KINDS or JOB not in payload.fields:
        return "", False
    privacy = Job.from_json(payload.text(JOB, source="this server")).privacy
    # The key is another each time, and a lineage tells when the server wrote it.
    passing = (CONTENT_KEY, LINEAGE)
    said = {name: value for name, value in payload.fields.items() if name not in passing}
    text = json.dumps([place.purpose, place.round, place.schema, said], sort_keys=True)
    keep = privacy is None or privacy.mechanism != "central"
    return hashlib.sha256(text.encode()).hexdigest(), keep
