"""Send messages to clinics and collect their replies, straight from the message store.

Flower's own grid talks to the server over HTTP with a token, polls every three
seconds, and one slow upload holds up all other replies. This one lives in the
server process, so no administrative API need be served on any socket.
"""

import threading
import time
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from typing import Protocol, cast

from flwr.app import Error, Message, RecordDict
from flwr.app.message import make_message, remove_content_from_message
from flwr.common.constant import ErrorCode
from flwr.server.superlink.linkstate import LinkState
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.object_store import NoObjectInStoreError
from flwr.supercore.run import Run

from fedpeft.errors import FederationError
from fedpeft.watchdog import came_round

Arrival = Callable[[int, Message], None]
"""Called with the node id and the reply, in the thread that waits for replies."""


class Route(Protocol):
    """Another way to some clinics than the message store."""

    @property
    def timeout_s(self) -> float:
        """Seconds that a clinic has to answer on this way, whatever is asked."""
        ...

    def takes(self, node: int) -> bool:
        """Say whether messages to ``node`` go this way."""
        ...

    def push(self, message: Message) -> str:
        """Send a message, and return its id."""
        ...

    def holds(self, message_id: str) -> bool:
        """Say whether a message went this way and has no reply yet."""
        ...

    def pull(self, message_id: str) -> Message | None:
        """Return the reply to a message once, if it has come."""
        ...

    def give_up(self, message_id: str) -> None:
        """Wait no longer for the reply to a message."""
        ...


@dataclass
class _Upload:
    """A reply that is announced, while its objects come in."""

    reply: Message
    missing: list[str]
    contents: dict[str, bytes] = field(default_factory=dict)


class FederationGrid(Grid):
    """Flower's ``Grid`` for one run; used by one thread at a time."""

    def __init__(
        self,
        state: LinkState,
        run: Run,
        *,
        connected: Callable[[], Iterable[int]],
        lost: threading.Event,
        stop: threading.Event,
        poll_s: float,
        on_arrival: Arrival | None = None,
        route: Route | None = None,
    ) -> None:
        """Serve ``run``.

        Args:
            state: Flower's message store.
            run: the run whose messages these are.
            connected: the ids of the nodes that are online.
            lost: set when the store has given the run up.
            stop: set to make :meth:`send_and_receive` return at once.
            poll_s: seconds between two looks at the store.
            on_arrival: told of each complete reply.
            route: the way to clinics that have no network.
        """
        self._state = state
        self._run = run
        self._connected = connected
        self._lost = lost
        self._stop = stop
        self._poll_s = poll_s
        self._on_arrival = on_arrival
        self._route = route
        self._destinations: dict[str, int] = {}
        self._uploads: dict[str, _Upload] = {}

    def set_run(self, run: Run) -> None:
        """Set the run; it is already set, this only serves Flower's interface."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run that messages belong to."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Build a message (Flower's older way; the constructor does the same)."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of the enrolled clinics that are online now."""
        came_round()
        return list(self._connected())

    def node_of(self, reply: Message) -> int:
        """Return the id of the node that was asked.

        Flower's own error replies (a clinic went offline) name the server as
        their source, so the question is looked up, not the reply.

        Raises:
            FederationError: no message of this grid is answered by ``reply``.
        """
        try:
            return self._destinations[reply.metadata.reply_to_message_id]
        except KeyError:
            raise FederationError("a reply came to a message that was never sent") from None

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Store messages for their clinics to fetch.

        Returns:
            One id for each message, in order; ``""`` where the store refused
            it, which is so for a clinic that has never connected.

        Raises:
            FederationError: the run is over.
        """
        self._check_running()
        pushed: list[str] = []
        for message in messages:
            if self._route is not None and self._route.takes(message.metadata.dst_node_id):
                pushed.append(self._route.push(message))
                self._destinations[pushed[-1]] = message.metadata.dst_node_id
                continue
            with no_object_id_recompute():
                pushed.append(self._push(message))
        return pushed

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the complete replies to these messages; each is returned once.

        Raises:
            FederationError: the run is over.
        """
        came_round()
        self._check_running()
        wanted = set(message_ids)
        elsewhere = {each for each in wanted if self._is_elsewhere(each)}
        wanted -= elsewhere
        unanswered = wanted - self._uploads.keys()
        for reply in self._state.get_message_res(message_ids=unanswered, run_id=self._run.run_id):
            self._announce(reply)
        complete: list[Message] = []
        for message_id in elsewhere:
            reply = None if self._route is None else self._route.pull(message_id)
            if reply is not None:
                complete.append(reply)
        for message_id in wanted & self._uploads.keys():
            reply = self._collect(self._uploads[message_id])
            if reply is not None:
                self._forget(message_id)
                complete.append(reply)
        return complete

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Generator[Message]:
        """Send messages and yield the replies as they come, keeping none.

        Ends as soon as all are answered, ``timeout`` seconds have passed (of a message that
        goes another way, that way's), or the stop event is set. Messages still unanswered
        are withdrawn then: a late reply is dropped. On another way they wait on for a server
        that is started anew, unless their time has passed.

        Raises:
            FederationError: the run is over.
        """
        waiting = {message_id for message_id in self.push_messages(messages) if message_id}
        began = time.monotonic()
        try:
            while waiting:
                for reply in self.pull_messages(waiting):
                    waiting.discard(reply.metadata.reply_to_message_id)
                    if self._on_arrival is not None:
                        self._on_arrival(self.node_of(reply), reply)
                    yield reply
                waiting -= self._give_up(waiting, time.monotonic() - began, timeout)
                if waiting and self._stop.wait(self._poll_s):
                    break
        finally:
            for message_id in waiting:
                if not self._is_elsewhere(message_id):
                    self._forget(message_id)

    def _is_elsewhere(self, message_id: str) -> bool:
        return self._route is not None and self._route.holds(message_id)

    def _give_up(self, waiting: set[str], waited_s: float, timeout: float | None) -> set[str]:
        """Withdraw the messages whose time has passed, and return their ids."""
        overdue: set[str] = set()
        for message_id in waiting:
            if self._route is not None and self._route.holds(message_id):
                if waited_s >= self._route.timeout_s:
                    self._route.give_up(message_id)
                    overdue.add(message_id)
            elif timeout is not None and waited_s >= timeout:
                self._forget(message_id)
                overdue.add(message_id)
        return overdue

    def _push(self, message: Message) -> str:
        # The store closes an upload session with its last missing object, so
        # messages that share a payload cannot share a session.
        session_id = self._state.start_session(self._run.run_id)
        message_id = message.object_id
        # Flower's metadata has no public setter for the id.
        message.metadata.__dict__["_message_id"] = message_id
        objects = get_all_nested_objects(message)
        stored, missing = self._state.store_message_and_object_tree(
            remove_content_from_message(message), get_object_tree(message), session_id
        )
        if not stored:
            return ""
        for object_id in missing:
            self._state.store_object(
                self._run.run_id, session_id, object_id, objects[object_id].deflate()
            )
        self._destinations[message_id] = message.metadata.dst_node_id
        return message_id

    def _announce(self, reply: Message) -> None:
        message_id = reply.metadata.message_id
        try:
            tree = self._state.object_store.get_object_tree(message_id)
        except NoObjectInStoreError:
            missing = [message_id]
        else:
            missing = list(dict.fromkeys(each.object_id for each in iterate_object_tree(tree)))
        self._uploads[reply.metadata.reply_to_message_id] = _Upload(reply, missing)

    def _collect(self, upload: _Upload) -> Message | None:
        """Fetch what has come in; the reply when it is whole, None while it is not."""
        message_id = upload.reply.metadata.message_id
        while upload.missing:
            object_id = upload.missing[-1]
            content = self._state.get_object(self._run.run_id, object_id)
            if content is None:
                # The clinic's upload broke off and the store has cleared it away.
                return _unavailable(upload.reply)
            if content == b"":
                return None
            upload.contents[object_id] = content
            upload.missing.pop()
        try:
            reply = cast(Message, inflate_object_from_contents(message_id, upload.contents))
        except Exception:  # whatever a clinic sent must not stop the round
            return _unavailable(upload.reply)
        if reply.metadata.reply_to_message_id != upload.reply.metadata.reply_to_message_id:
            return _unavailable(upload.reply)
        reply.metadata.__dict__["_message_id"] = message_id
        return reply

    def _forget(self, message_id: str) -> None:
        upload = self._uploads.pop(message_id, None)
        self._state.delete_messages(message_ins_ids={message_id})
        if upload is not None:
            self._state.object_store.delete(upload.reply.metadata.message_id)

    def _check_running(self) -> None:
        if self._lost.is_set():
            raise FederationError(
                "the run has ended, as this server stood still for more than a minute "
                "(was the machine suspended?): start it again to resume from the last checkpoint"
            )


def _unavailable(reply: Message) -> Message:
    error = Error(code=ErrorCode.MESSAGE_UNAVAILABLE, reason="incomplete-reply")
    return make_message(metadata=reply.metadata, error=error)
