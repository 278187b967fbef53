"""Questions out to files, and answers in from files, beside a server that may be running."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from fedpeft.errors import EnrolmentError, StickRefused, StorageError
from fedpeft.protocol import KINDS
from fedpeft.protocol.stick_file import ReadFile, StickFile, read_stick_file
from fedpeft.sealing import PublicIdentity
from fedpeft.storage import require_folder, write_atomically
from fedpeft_server.enrolments.clinic import Clinic
from fedpeft_server.enrolments.enrolment import Enrolments
from fedpeft_server.site.lock import server_runs
from fedpeft_server.sticks.post import StickPost

_SLACK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """What became of one file: the answer that was taken, or a sentence why none was."""

    path: Path
    answer: StickFile | None = None
    refused: str = ""


class Carrying:
    """The post of one site; ``state`` is the directory of the server's state."""

    def __init__(self, state: Path, enrolments: Enrolments) -> None:
        self._post = StickPost(state)
        self._enrolments = enrolments
        self._running = server_runs(state)

    def export(self, names: Collection[str], folder: Path) -> list[tuple[StickFile, Path]]:
        """Write into the folder ``folder`` one file for each clinic for which a question waits.

        ``names`` are the clinics to write for; none: all. A question that was exported before
        is the same file again.

        Raises:
            EnrolmentError: a clinic is not enrolled, or not reached by stick.
            StorageError: a file cannot be read or written, or there is no such folder.
        """
        require_folder(folder)
        members = self._members()
        for name in names:
            if name not in members:
                raise EnrolmentError(
                    f"no clinic named {name!r} takes part: fedpeft-server clinics lists the names"
                )
            if members[name].carrier != "stick":
                raise EnrolmentError(
                    f"clinic {name} is reached by network: fedpeft-server carrier {name} stick "
                    "would change that from the next question on"
                )
        written: list[tuple[StickFile, Path]] = []
        for name, (question, content) in self._post.waiting().items():
            if name not in members or (names and name not in names):
                continue
            if not self._running and question.context.purpose not in KINDS:
                continue  # the sum ended with its server
            path = folder / question.name
            write_atomically(path, content, mode=0o600)
            written.append((question, path))
        return written

    def why_nothing(self, names: Collection[str]) -> str:
        """Return a sentence on why nothing was exported for ``names`` (none: for anybody)."""
        on_stick = [each.name for each in self._members().values() if each.carrier == "stick"]
        if not on_stick:
            return (
                "no clinic is reached by stick: let one join with fedpeft-client join --stick, or "
                "change the way to one with fedpeft-server carrier NAME stick"
            )
        if not self._running:
            return (
                "no server is running on this site, so nobody is asked anything: start it with "
                "fedpeft-server start, and export when it says that a clinic is asked by stick"
            )
        chosen = [name for name in on_stick if not names or name in names]
        here = set(self._post.answered())
        if answered := [name for name in chosen if name in here]:
            return (
                f"the answer of {', '.join(answered)} is here already, and the server asks the "
                "next thing when the other clinics have answered too: export when it says that a "
                "clinic is asked by stick"
            )
        return (
            f"nothing waits for {', '.join(chosen)}: the server asks nothing now, perhaps as it "
            "waits for other clinics to connect, which it says then; export when it says that a "
            "clinic is asked by stick"
        )

    def take(self, path: Path, max_bytes: int) -> Imported:
        """Put the answer in a file where the server finds it, or say why not.

        Raises:
            StorageError: the server's own folder cannot be used.
        """
        try:
            read = read_stick_file(path, max_bytes + _SLACK_BYTES)
        except StickRefused as error:
            return Imported(path=path, refused=f"{path} {error}")
        except StorageError as error:  # it is lost, or its stick is broken; others are not
            return Imported(path=path, refused=str(error))
        try:
            sender = self._sender_of(read)
            return Imported(path=path, answer=self._post.deliver(read, sender))
        except StickRefused as error:
            return Imported(path=path, refused=f"{path} {error}")

    def _sender_of(self, read: ReadFile) -> PublicIdentity:
        """Return the identity of the clinic that an answer is of.

        Raises:
            StickRefused: it is no answer, of another federation, of no clinic of this one, or
                for a server that does not run.
        """
        found, here = read.file, self._enrolments.federation
        if found.kind != "answer":
            raise StickRefused(
                "is a question of the central site, not an answer: on the box, run "
                "fedpeft-client round run, and bring what that writes"
            )
        if found.context.federation != here:
            raise StickRefused(
                f"is foreign: it is of federation {found.context.federation}, and this is {here}"
            )
        clinic = self._members().get(found.clinic)
        if clinic is None or clinic.identity is None:
            raise StickRefused(f"is foreign: no clinic {found.clinic} takes part in {here}")
        if not self._running and found.context.purpose not in KINDS:
            raise StickRefused(
                "is a step of a secure sum, which ended with the server that asked: start the "
                "server, export again, and bring the box that file"
            )
        return clinic.identity

    def _members(self) -> dict[str, Clinic]:
        return {each.name: each for each in self._enrolments.members()}
