"""Answer one question that came on a stick, as a running client answers it from the network.

The same app, log and limits; only the carrier differs. Must not know the command line.
"""

import time
from dataclasses import dataclass
from typing import Final

from flwr.app import Context, Message, Metadata, RecordDict
from flwr.app.message import make_message
from flwr.common.constant import SUPERLINK_NODE_ID

from fedpeft.errors import PolicyRefused, SizeLimit, StickRefused
from fedpeft.protocol import MESSAGE_TYPES, carried, carry, raw
from fedpeft.protocol.stick_file import ReadFile, StickFile, parse_stick_file
from fedpeft.sealing import Identity
from fedpeft_client.rounds.answering import Application, answer, refusal
from fedpeft_client.rounds.clinic import Clinic
from fedpeft_client.sticks.memory import StickMemory
from fedpeft_client.trail import Trail

_LIFE_S: Final = 365 * 86400.0
"""Flower's messages have an end, which one on a stick must never come to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """The file that goes back; ``reason`` says in a word why it holds no answer, if so.

    ``again`` says that the question had been answered before, and this is the same file.
    """

    file: StickFile
    content: bytes
    again: bool = False

    @property
    def reason(self) -> str:
        """The reason word that the central site is told; empty if it gets an answer."""
        return self.file.reason


class StickDesk:
    """Answers for ``clinic`` with ``app``, which must keep what it knows in ``memory``."""

    def __init__(
        self, clinic: Clinic, app: Application, memory: StickMemory, trail: Trail, max_bytes: int
    ) -> None:
        self._clinic = clinic
        self._app = app
        self._memory = memory
        self._trail = trail
        self._max_bytes = max_bytes

    def answer(self, question: StickFile) -> Answered:
        """Return the answer to a question that :func:`own_question` let pass.

        Raises:
            StickRefused: it is old.
            StorageError, AuditLogDamaged: what must be kept or noted cannot be written; nothing
                may leave.
        """
        place = question.context
        kept = self._memory.answer_to(question.question, place.run)
        if kept is not None:
            return Answered(file=parse_stick_file(kept).file, content=kept, again=True)
        message = _message_of(question)
        try:
            self._require_allowed(question)
            self._trail.received(message)
            reply, _ = answer(self._app, message, _context_of(place.run))
        except PolicyRefused as error:
            self._trail.refused(message, error)
            reply = refusal(message, error.reason)
        self._trail.leaving(reply)
        if reply.has_error():
            # Not kept: when its people have changed something, the box may be asked again.
            refused = question.answered(reason=reply.error.reason or "internal-error")
            return Answered(file=refused, content=refused.to_bytes(self._signer))
        sealed, _ = carried(reply.content, source="this box")
        done = question.answered(sealed=sealed)
        content = done.to_bytes(self._signer)
        self._memory.keep_answer(question.question, content)
        return Answered(file=done, content=content)

    @property
    def _signer(self) -> Identity:
        return self._clinic.membership.identity

    def _require_allowed(self, question: StickFile) -> None:
        if question.context.purpose not in MESSAGE_TYPES:
            allowed = ", ".join(sorted(MESSAGE_TYPES))
            raise PolicyRefused(
                f"the server asks for {question.context.purpose!r}, but this clinic allows "
                f"{allowed} only"
            )
        size = len(question.sealed) + len(question.broadcast or b"")
        if size > self._max_bytes:
            raise SizeLimit(
                f"a message is larger than the {self._max_bytes} bytes that this clinic allows"
            )


def own_question(clinic: Clinic, read: ReadFile) -> StickFile:
    """Return the question in a file, if the pinned server wrote it for ``clinic``.

    Raises:
        StickRefused: it is an answer, foreign or forged.
    """
    found = read.file
    if found.kind != "question":
        raise StickRefused(
            "is an answer of a box, not a question of the central site: it is for that site"
        )
    place = found.context
    if (place.federation, found.clinic) != (clinic.federation, clinic.name):
        raise StickRefused(
            f"is foreign: it is for clinic {found.clinic} of federation {place.federation}, and "
            f"this box is {clinic.name} of {clinic.federation}"
        )
    try:
        return read.signed_by(clinic.membership.server, source="the central site")
    except StickRefused as error:
        raise StickRefused(
            f"{error}; if the central site has renewed its identity, renew the keys of this box "
            "(fedpeft-client rotate --stick REQUEST), and the box follows with them"
        ) from None


def _message_of(question: StickFile) -> Message:
    place = question.context
    broadcast = None if question.broadcast is None else raw(question.broadcast)
    return make_message(
        metadata=Metadata(
            run_id=place.run,
            message_id=question.question,
            src_node_id=SUPERLINK_NODE_ID,
            dst_node_id=0,
            reply_to_message_id="",
            group_id="",
            created_at=time.time(),
            ttl=_LIFE_S,
            message_type=place.purpose,
        ),
        content=carry(question.sealed, broadcast),
    )


def _context_of(run: int) -> Context:
    return Context(run_id=run, node_id=0, node_config={}, state=RecordDict(), run_config={})
