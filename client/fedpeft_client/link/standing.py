"""What a box's process leaves to the one that takes its place after a kill or a power cut.

The server believes in a process that vanished for a minute, and waits for its answer. The next
process on the same folder goes on under its number at once, and says that what was asked is to
be asked again. Whoever uses it holds the box (``box_lock``), so that the former process has
ended for certain. What is kept is bound to the machine and the folder: a copy of the folder
waits until the server has given the other up. Holds no content of a message.
"""

import base64
import contextlib
import hashlib
import logging
from pathlib import Path
from typing import Final

from flwr.app import Message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as MessageProto
from google.protobuf.message import DecodeError
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedpeft.storage import explained, write_atomically

log: Final = logging.getLogger(__name__)

STANDING_FILE: Final = "standing.json"
_MACHINE: Final = Path("/etc/machine-id")
_UNKNOWN: Final = 0


class Standing:
    """Keeps nothing: for a client that is not the only one on its folder."""

    @property
    def node(self) -> int:
        """The clinic's number at the server, as the last process had it; 0 if not known."""
        return _UNKNOWN

    @property
    def question(self) -> Message | None:
        """What a former process was asked and did not answer, without its content."""
        return None

    def online(self, node: int) -> None:
        """Note that the server knows this process by ``node``."""

    def asked(self, head: Message) -> None:
        """Note a message that has come, before anything is done about it."""

    def answered(self) -> None:
        """Note that nobody waits for an answer any more."""

    def left(self) -> None:
        """Forget it all, after a goodbye that the server has heard; never fails."""


class _Kept(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    schema_: int = Field(default=1, ge=1, le=1, alias="schema")
    place: str
    """SHA-256 of the machine's id and the number of the folder."""
    node: int
    question: str | None = None
    """Flower's message without its content, in base64."""


class KeptStanding(Standing):
    """Keeps it in a file of the box in ``folder``; used by one thread.

    Every method but :meth:`left` raises ``StorageError`` if the file cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        """Read what a former process left.

        Raises:
            StorageError: the folder cannot be read.
        """
        self._path = folder / STANDING_FILE
        with explained("read", folder):
            self._place = _place_of(folder)
        self._kept = self._read()

    @property
    def node(self) -> int:
        """The clinic's number at the server, as the last process had it; 0 if not known."""
        return self._kept.node

    @property
    def question(self) -> Message | None:
        """What a former process was asked and did not answer, without its content."""
        if self._kept.question is None:
            return None
        try:
            return message_from_proto(
                MessageProto.FromString(base64.b64decode(self._kept.question))
            )
        except (DecodeError, ValueError, TypeError, KeyError) as error:
            log.info("what the former process was asked cannot be read: %s", type(error).__name__)
            return None

    def online(self, node: int) -> None:
        """Note that the server knows this process by ``node``."""
        self._write(node, self._kept.question)

    def asked(self, head: Message) -> None:
        """Note a message that has come, before anything is done about it."""
        coded = base64.b64encode(message_to_proto(head).SerializeToString())
        self._write(self.node, coded.decode("ascii"))

    def answered(self) -> None:
        """Note that nobody waits for an answer any more."""
        self._write(self.node, None)

    def left(self) -> None:
        """Forget it all, after a goodbye that the server has heard; never fails."""
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)

    def _write(self, node: int, question: str | None) -> None:
        self._kept = _Kept(place=self._place, node=node, question=question)
        text = self._kept.model_dump_json(by_alias=True)
        write_atomically(self._path, text.encode(), mode=0o600)

    def _read(self) -> _Kept:
        try:
            kept = _Kept.model_validate_json(self._path.read_bytes())
        except (OSError, ValidationError) as error:
            if not isinstance(error, FileNotFoundError):
                # It only saves a minute, which is waited then.
                log.warning("%s is of no use: %s", STANDING_FILE, type(error).__name__)
        else:
            if kept.place == self._place:
                return kept
        return _Kept(place=self._place, node=_UNKNOWN)


def _place_of(folder: Path) -> str:
    try:
        machine = _MACHINE.read_bytes().strip()
    except OSError:
        machine = b""
    return hashlib.sha256(b"%s\n%d" % (machine, folder.stat().st_ino)).hexdigest()
