"""The way of messages to clinics on the stick, beside Flower's message store."""

from collections.abc import Callable, Mapping
from typing import Final

from flwr.app import Error, Message
from flwr.common.constant import ErrorCode

from fedpeft.protocol import carried, carry
from fedpeft_server.sticks.post import StickPost

_SOURCE: Final = "this server"


class StickRoute:
    """Hands Flower's messages to ``post`` and makes Flower's replies of what comes back."""

    def __init__(
        self, post: StickPost, nodes: Callable[[], Mapping[int, str]], timeout_s: float
    ) -> None:
        """``nodes`` returns the clinics on the stick, by node id."""
        self.timeout_s: Final = timeout_s
        self._post = post
        self._nodes = nodes
        self._asked: dict[str, tuple[str, Message]] = {}

    def takes(self, node: int) -> bool:
        """Say whether the clinic ``node`` is on the stick."""
        return node in self._nodes()

    def push(self, message: Message) -> str:
        """Lay a message out, and return the id under which its reply is known.

        Raises:
            StorageError: it cannot be written.
        """
        clinic = self._nodes()[message.metadata.dst_node_id]
        sealed, broadcast = carried(message.content, source=_SOURCE)
        question = self._post.ask(clinic, sealed, broadcast)
        # What remains in memory is the head, to which the reply is one.
        head = Message(carry(b""), message.metadata.dst_node_id, message.metadata.message_type)
        head.metadata.__dict__["_message_id"] = question
        self._asked[question] = clinic, head
        return question

    def holds(self, message_id: str) -> bool:
        """Say whether a message went this way and waits for its reply."""
        return message_id in self._asked

    def pull(self, message_id: str) -> Message | None:
        """Return the reply to a message if it has come; it is returned once.

        Raises:
            StorageError: it cannot be read.
        """
        clinic, head = self._asked[message_id]
        answer = self._post.take(clinic, message_id)
        if answer is None:
            return None
        del self._asked[message_id]
        if answer.reason:
            error = Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=answer.reason)
            return Message(error, reply_to=head)
        return Message(carry(answer.sealed), reply_to=head)

    def give_up(self, message_id: str) -> None:
        """Wait no longer for the reply to a message."""
        clinic, _ = self._asked.pop(message_id)
        self._post.withdraw(clinic, message_id)
