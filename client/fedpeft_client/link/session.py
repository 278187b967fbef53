"""One clinic's standing with the server: online or not, and its messages on their way.

Every call outlives outages, see ``patient_calls``. Must not know what messages are about.
"""

import contextlib
import logging
import threading
from collections.abc import Callable, Generator
from typing import Final

import httpx
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL
from flwr.common.serde import message_from_proto, message_to_proto, run_from_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ObjectTree,
    PullObjectRequest,
    PushObjectRequest,
)
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest
from flwr.supercore.error import ApiErrorCode
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectPushError,
    ObjectUnavailableError,
    inflate_object_from_contents,
    pull_objects,
    push_objects,
)
from flwr.supercore.run import Run

from fedpeft.errors import ConnectionFailed, PolicyRefused, SizeLimit
from fedpeft_client.link.fleet import FleetClient
from fedpeft_client.link.patient_calls import MessageLost, PatientCalls, Rejected
from fedpeft_client.link.standing import Standing

log: Final = logging.getLogger(__name__)

_ACTIVATION_PAUSE_S: Final = 2.0
_BEAT_S: Final = 20.0
_BEAT_AGAIN_S: Final = 3.0
_GOODBYE_S: Final = 1.0
_UPLOAD_TRIES: Final = 3
_MAX_OBJECTS: Final = 10_000


class Session:
    """One clinic's standing with the server."""

    def __init__(
        self,
        client: FleetClient,
        calls: PatientCalls,
        standing: Standing,
        *,
        server: str,
        on_waiting: Callable[[], None],
    ) -> None:
        """Prepare; nothing is sent before :meth:`activate`.

        Args:
            client: the calls themselves.
            calls: the way in which they are made.
            standing: what a former process of this clinic left.
            server: the address, for people.
            on_waiting: told once if the server has to notice first that another process ended.
        """
        self._client = client
        self._calls = calls
        self._call = calls.call
        self._standing = standing
        self._server = server
        self._on_waiting = on_waiting
        self._node = Node()

    @property
    def node_id(self) -> int:
        """The id by which the server knows this clinic; 0 before activation."""
        return self._node.node_id

    def activate(self) -> None:
        """Come online, in the place of a former process of this folder if there was one.

        Waits while the server believes in another process, which is for up to a minute after
        one of which nothing is known here has vanished.

        Raises:
            Stopped: the stop event was set first.
            EnrolmentError: the server does not know the key.
            ClockSkew, CertificateRefused: see :mod:`fedpeft_client.link.fleet`.
            StorageError: the folder cannot be written.
        """
        told = False
        while not self._comes_online():
            if not told:
                self._on_waiting()
            told = True
            self._calls.pause(_ACTIVATION_PAUSE_S)
        self._standing.online(self.node_id)

    def _comes_online(self) -> bool:
        request = ActivateNodeRequest(
            public_key=self._calls.public_key, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL
        )
        try:
            self._node = Node(node_id=self._call(self._client.ActivateNode, request).node_id)
        except Rejected as refused:
            if refused.code != ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED:
                raise ConnectionFailed(
                    f"the server {self._server} refuses this machine ({refused}): "
                    "check that both run the same fedpeft version"
                ) from refused
            return self._succeeds()
        return True

    def _succeeds(self) -> bool:
        """Go on under the number of the former process on this folder, if there was one."""
        if not self._standing.node:
            return False
        self._node = Node(node_id=self._standing.node)
        try:
            return self._call(self._client.SendNodeHeartbeat, self._sign_of_life()).success
        except MessageLost:
            # The clinic was given another number since.
            self._node = Node()
            return False

    def deactivate(self) -> None:
        """Say goodbye, so that the server need not wait a minute to notice; never fails."""
        if not self.node_id or not self._calls.reachable:
            return
        self._client.hurry(_GOODBYE_S)
        with contextlib.suppress(httpx.HTTPError, ValueError, PolicyRefused):
            self._client.DeactivateNode(DeactivateNodeRequest(node_id=self.node_id))
            self._standing.left()

    @contextlib.contextmanager
    def heartbeat(self) -> Generator[None]:
        """Keep this clinic online in a background thread, while an answer takes its time."""
        ended = threading.Event()
        beating = threading.Thread(
            target=self._beat, args=(ended,), name="fedpeft-heartbeat", daemon=True
        )
        beating.start()
        try:
            yield
        finally:
            ended.set()
            self._calls.recovered.set()
            beating.join(_GOODBYE_S)

    def poll(self) -> tuple[Message, ObjectTree] | None:
        """Ask for a message; its content is still to be fetched."""
        response = self._call(self._client.PullMessages, PullMessagesRequest(node=self._node))
        if not response.messages_list:
            return None
        try:
            head = message_from_proto(response.messages_list[0])
            return head, response.message_object_trees[0]
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise MessageLost("the server sent something that is no message") from error

    def run_of(self, run_id: int) -> Run:
        """Return what the server says about a run.

        Raises:
            RunEnded: it is over.
        """
        response = self._call(self._client.GetRun, GetRunRequest(node=self._node, run_id=run_id))
        return run_from_proto(response.run)

    def fetch(self, head: Message, tree: ObjectTree, max_bytes: int) -> tuple[Message, int]:
        """Download the content of a message and say that it has arrived.

        Returns:
            The message with its content, and its size in bytes.

        Raises:
            SizeLimit: it is larger than ``max_bytes``.
            TrafficLimit: today's bytes are used up.
            MessageLost: the server no longer has it, or it cannot be read.
            RunEnded, Stopped: as they say.
        """
        run_id, message_id = head.metadata.run_id, head.metadata.message_id
        object_ids = list(dict.fromkeys(each.object_id for each in iterate_object_tree(tree)))
        allowance = _Allowance(max_bytes)
        if len(object_ids) > _MAX_OBJECTS:
            raise SizeLimit(f"a message has {len(object_ids)} parts, over {_MAX_OBJECTS}")

        def pull(object_id: str) -> bytes:
            request = PullObjectRequest(node=self._node, run_id=run_id, object_id=object_id)
            response = self._call(self._client.PullObject, request)
            if not response.object_found:
                raise ObjectPullError(object_id, "the object could not be found.")
            if not response.object_available:
                raise ObjectUnavailableError(object_id)
            allowance.take(len(response.object_content))
            return response.object_content

        try:
            contents = pull_objects(object_ids, pull, initial_backoff=0.1, backoff_cap=2.0)
        except ObjectPullError as error:
            raise MessageLost("the server no longer has the message") from error
        self._call(
            self._client.ConfirmMessageReceived,
            ConfirmMessageReceivedRequest(
                node=self._node, run_id=run_id, message_object_id=message_id
            ),
        )
        try:
            message = inflate_object_from_contents(message_id, contents)
        except Exception as error:  # whatever the server sent must not end the client
            raise MessageLost("the server sent a message that cannot be read") from error
        if not isinstance(message, Message):
            raise MessageLost("the server sent something that is no message")
        message.metadata.__dict__["_message_id"] = message_id
        return message, allowance.taken

    def deliver(self, reply: Message, seconds: float) -> int:
        """Upload a reply; ``seconds`` is how long the answer took.

        Returns:
            The bytes uploaded.

        Raises:
            MessageLost: the server does not take it.
            RunEnded, Stopped: as they say.
        """
        # Flower's metadata has no public setter for the id.
        reply.metadata.__dict__["_message_id"] = reply.object_id
        for _ in range(_UPLOAD_TRIES):
            # An upload that pauses for three minutes is cleared away by the
            # server, and must begin again.
            with contextlib.suppress(ObjectPushError), no_object_id_recompute():
                return self._upload(reply, seconds)
        raise MessageLost("the upload of a reply broke off three times")

    def _upload(self, reply: Message, seconds: float) -> int:
        run_id = reply.metadata.run_id
        response = self._call(
            self._client.PushMessages,
            PushMessagesRequest(
                node=self._node,
                messages_list=[message_to_proto(remove_content_from_message(reply))],
                message_object_trees=[get_object_tree(reply)],
                clientapp_runtime_list=[seconds],
            ),
        )
        counted = _Allowance(None)

        def push(object_id: str, content: bytes) -> None:
            request = PushObjectRequest(
                node=self._node,
                run_id=run_id,
                object_id=object_id,
                object_content=content,
                session_id=response.session_id,
            )
            if not self._call(self._client.PushObject, request).stored:
                raise ObjectPushError(object_id, run_id, response.session_id)
            counted.take(len(content))

        push_objects(
            get_all_nested_objects(reply),
            push,
            object_ids_to_push=set(response.objects_to_push),
        )
        return counted.taken

    def _sign_of_life(self) -> SendNodeHeartbeatRequest:
        return SendNodeHeartbeatRequest(
            node=self._node, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL
        )

    def _beat(self, ended: threading.Event) -> None:
        request = self._sign_of_life()
        while not ended.is_set():
            self._calls.recovered.clear()
            try:
                self._client.SendNodeHeartbeat(request)
                pause = _BEAT_S
            except Exception as error:  # the calls of the main loop explain it better
                log.debug("heartbeat failed: %s", type(error).__name__)
                pause = _BEAT_AGAIN_S
            if not ended.is_set():
                self._calls.recovered.wait(pause)


class _Allowance:
    """A thread-safe byte count with an optional limit."""

    def __init__(self, max_bytes: int | None) -> None:
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self.taken = 0

    def take(self, size: int) -> None:
        with self._lock:
            self.taken += size
            if self._max_bytes is not None and self.taken > self._max_bytes:
                raise SizeLimit(
                    f"a message is larger than the {self._max_bytes} bytes that this clinic allows"
                )
