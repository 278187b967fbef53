"""Calls to the server that outlive outages: activation, heartbeats, messages.

Every call is repeated with growing pauses until it succeeds, the server says
that it never will, or the stop event is set.
"""

import contextlib
import logging
import secrets
import threading
from collections.abc import Callable, Generator
from http import HTTPStatus
from pathlib import Path
from typing import Final, TypeVar

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
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
from flwr.supercore.error import ApiErrorCode, FlowerError
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
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.run import Run

from fedpeft.errors import (
    CertificateRefused,
    ConnectionFailed,
    EnrolmentError,
    PolicyRefused,
    SizeLimit,
)
from fedpeft.watchdog import came_round
from fedpeft_client.fleet import Clock, FleetClient, check_skew, explain, load_key, measure
from fedpeft_client.key_life import renewal_in_progress

log: Final = logging.getLogger(__name__)

_FIRST_PAUSE_S: Final = 0.5
_LONGEST_PAUSE_S: Final = 30.0
_OUTAGE_STATUSES: Final = frozenset({429, 502, 503, 504})
# Flower answers 500 when its database is busy, which passes, but also when a
# message can never be stored, which does not.
_TRIES_AT_500: Final = 8
_ACTIVATION_PAUSE_S: Final = 2.0
_BEAT_S: Final = 20.0
_BEAT_AGAIN_S: Final = 3.0
_GOODBYE_S: Final = 1.0
_UPLOAD_TRIES: Final = 3
_MAX_OBJECTS: Final = 10_000

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")


class Stopped(Exception):
    """The stop event was set while a call was under way."""


class RunEnded(Exception):
    """The server no longer takes part in the run of this message."""


class MessageLost(Exception):
    """A message or reply cannot be transferred; the next one may well be."""


class _Rejected(MessageLost):
    """The server refused a call for good; ``code`` is Flower's, or None."""

    def __init__(self, status: int, code: int | None) -> None:
        super().__init__(f"the server answered HTTP {status}")
        self.code = code


class Session:
    """One clinic's standing with the server."""

    def __init__(
        self,
        client: FleetClient,
        http: httpx.Client,
        server: str,
        key: ec.EllipticCurvePrivateKey,
        *,
        key_file: Path,
        stop: threading.Event,
        clock: Clock,
        on_outage: Callable[[str], None],
        on_recovery: Callable[[], None],
        on_waiting: Callable[[], None],
    ) -> None:
        """Prepare; nothing is sent before :meth:`activate`."""
        self._client = client
        self._http = http
        self._server = server
        self._public_key = public_key_to_bytes(key.public_key())
        self._key_file = key_file
        self._stop = stop
        self._clock = clock
        self._on_outage = on_outage
        self._on_recovery = on_recovery
        self._on_waiting = on_waiting
        self._node = Node()
        self._reachable = True
        self._beat_now = threading.Event()
        self._lock = threading.Lock()

    @property
    def node_id(self) -> int:
        """The id by which the server knows this clinic; 0 before activation."""
        return self._node.node_id

    def activate(self) -> None:
        """Come online; wait while the server still believes in a former process.

        Raises:
            Stopped: the stop event was set first.
            EnrolmentError: the server does not know the key.
            ClockSkew, CertificateRefused: see :mod:`fedpeft_client.fleet`.
        """
        request = ActivateNodeRequest(
            public_key=self._public_key, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL
        )
        told = False
        while True:
            try:
                self._node = Node(node_id=self._call(self._client.ActivateNode, request).node_id)
                return
            except _Rejected as refused:
                if refused.code != ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED:
                    raise ConnectionFailed(
                        f"the server {self._server} refuses this machine ({refused}): "
                        "check that both run the same fedpeft version"
                    ) from refused
            if not told:
                self._on_waiting()
            told = True
            self._pause(_ACTIVATION_PAUSE_S)

    def deactivate(self) -> None:
        """Say goodbye, so that the server need not wait a minute to notice; never fails."""
        if not self.node_id or not self._reachable:
            return
        self._client.hurry(_GOODBYE_S)
        with contextlib.suppress(httpx.HTTPError, ValueError, PolicyRefused):
            self._client.DeactivateNode(DeactivateNodeRequest(node_id=self.node_id))

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
            self._beat_now.set()
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

    def _call(self, method: Callable[[_Request], _Response], request: _Request) -> _Response:
        pause, tries_at_500 = _FIRST_PAUSE_S, 0
        while True:
            if self._stop.is_set():
                raise Stopped
            came_round()
            try:
                response = method(request)
            except httpx.HTTPStatusError as error:
                tries_at_500 += error.response.status_code == HTTPStatus.INTERNAL_SERVER_ERROR
                trouble = self._judge(error.response, tries_at_500)
            except httpx.TransportError as error:
                explained = explain(error, self._server)
                if isinstance(explained, CertificateRefused):
                    raise explained from error
                trouble = str(explained)
            except ValueError as error:
                raise MessageLost("the server gave an answer that cannot be read") from error
            else:
                self._note_recovery()
                return response
            self._note_outage(trouble)
            self._pause(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    def _judge(self, response: httpx.Response, tries_at_500: int) -> str:
        """Return what passes by itself as a sentence; raise what does not."""
        status = response.status_code
        if status == HTTPStatus.UNAUTHORIZED:
            return self._judge_unauthorised()
        if status in _OUTAGE_STATUSES or 0 < tries_at_500 < _TRIES_AT_500:
            return f"the server {self._server} is busy (HTTP {status})"
        error = FlowerError.from_json(response.text)
        if status == HTTPStatus.FORBIDDEN:
            raise RunEnded
        raise _Rejected(status, None if error is None else error.code)

    def _judge_unauthorised(self) -> str:
        # Flower gives one answer for a wrong clock and an unknown key.
        try:
            skew_s, _ = measure(self._http, self._server, self._clock)
        except CertificateRefused:
            raise
        except ConnectionFailed as error:
            return str(error)
        check_skew(skew_s)
        if self._takes_renewed_key():
            return "the key of this machine's connection was renewed"
        raise EnrolmentError(
            f"the server {self._server} does not know this machine's key: the clinic was removed, "
            "or the server set up anew, so ask for a new invitation and join again"
        )

    def _takes_renewed_key(self) -> bool:
        """Say whether the key was renewed since, or is about to be, and sign with it."""
        key = load_key(self._key_file)
        public = public_key_to_bytes(key.public_key())
        if public == self._public_key:
            return renewal_in_progress(self._key_file).exists()
        self._public_key = public
        self._client.sign_with(key)
        return True

    def _pause(self, seconds: float) -> None:
        # Many clinics lose the server at the same moment and should not all
        # come back at the same moment.
        jitter = 0.5 + secrets.randbelow(1000) / 2000
        if self._stop.wait(seconds * jitter):
            raise Stopped

    def _note_outage(self, trouble: str) -> None:
        with self._lock:
            known, self._reachable = not self._reachable, False
        if not known:
            self._on_outage(trouble)

    def _note_recovery(self) -> None:
        with self._lock:
            known, self._reachable = self._reachable, True
        if not known:
            # The server may have counted this clinic as gone meanwhile.
            self._beat_now.set()
            self._on_recovery()

    def _beat(self, ended: threading.Event) -> None:
        request = SendNodeHeartbeatRequest(
            node=self._node, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL
        )
        while not ended.is_set():
            self._beat_now.clear()
            try:
                self._client.SendNodeHeartbeat(request)
                pause = _BEAT_S
            except Exception as error:  # the calls of the main loop explain it better
                log.debug("heartbeat failed: %s", type(error).__name__)
                pause = _BEAT_AGAIN_S
            if not ended.is_set():
                self._beat_now.wait(pause)


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
