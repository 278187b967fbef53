"""What the outside may ask of the server; everything else does not exist.

Flower's server answers clinics and administrators on one socket, and asks the
latter for no proof. This door stands before it: it lets through the few calls
a clinic makes, by exact path, from keys that have enrolled, of bounded size.
"""

import asyncio
import base64
import binascii
import json
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from typing import Any, Final

from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER
from google.protobuf.message import DecodeError

from fedpeft.errors import EnrolmentError, FedpeftError
from fedpeft_server.enrolments.rate_limit import EnrolmentLimit
from fedpeft_server.enrolments.refusal import InvitationRefused

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

PUSH_MESSAGES: Final = "/v1/fleet/push-messages"
PUSH_OBJECT: Final = "/v1/fleet/push-object"
# Registering nodes and fetching code are calls of Flower's that no clinic makes.
FLEET_PATHS: Final = frozenset(
    {
        "/v1/fleet/activate-node",
        "/v1/fleet/deactivate-node",
        "/v1/fleet/send-node-heartbeat",
        "/v1/fleet/pull-messages",
        PUSH_MESSAGES,
        "/v1/fleet/get-run",
        PUSH_OBJECT,
        "/v1/fleet/pull-object",
        "/v1/fleet/confirm-message-received",
    }
)
HEALTH_PATH: Final = "/health"
ENROL_PATH: Final = "/v1/enrol"
RENEW_PATH: Final = "/v1/renew"
SUCCESSION_PATH: Final = "/v1/succession"

_KEY_HEADER: Final = FLEET_HTTP_PUBLIC_KEY_HEADER.encode("ascii")
_ENROL_MAX_BYTES: Final = 8192
_ENROL_BODY_TIMEOUT_S: Final = 10.0
_FLEET_BODY_TIMEOUT_S: Final = 300.0
_REFUSAL_STATUS: Final = {"unknown": 403, "expired": 410, "used": 409}
_MEMBERS_FRESH_S: Final = 1.0
_SEEN_EVERY_S: Final = 60.0


class _Refused(Exception):
    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


class PublicDoor:
    """The ASGI application of the public socket."""

    def __init__(
        self,
        flower: Application,
        *,
        member_keys: Callable[[], frozenset[bytes]],
        member_stamp: Callable[[], tuple[int, ...]],
        saw: Callable[[bytes], None],
        enrol: Callable[[str, str, str, str], dict[str, str]],
        renew: Callable[[str], dict[str, str]],
        succession: Sequence[str],
        max_request_bytes: int,
        max_message_bytes: int,
        enrol_attempts_per_minute: int = 10,
    ) -> None:
        """Stand before ``flower``.

        Args:
            flower: Flower's own application.
            member_keys: the enrolled public keys, PEM; called in a worker
                thread, when ``member_stamp`` changed and at most a second later.
            member_stamp: numbers that change when a clinic comes or goes; called
                for every request.
            saw: told of a member key (PEM) that proved itself, at most once a
                minute for each; called in a worker thread.
            enrol: takes a token, a public key (PEM), a public identity and the
                proof of its possession, returns the JSON answer, or raises
                EnrolmentError; called in a worker thread.
            renew: takes a clinic's statement about its new keys, else like ``enrol``.
            succession: the statements by which this server's identity came into
                the place of older ones, for everybody to read.
            max_request_bytes: cap on one HTTP body, however it is framed.
            max_message_bytes: cap on all objects of one reply of one clinic.
            enrol_attempts_per_minute: for one network address.
        """
        self._flower = flower
        self._member_keys = member_keys
        self._enrol = enrol
        self._renew = renew
        self._succession = list(succession)
        self._max_request_bytes = max_request_bytes
        self._max_message_bytes = max_message_bytes
        self._limiter = EnrolmentLimit(enrol_attempts_per_minute)
        self._member_stamp = member_stamp
        self._members_stamp: tuple[int, ...] = ()
        self._saw = saw
        self._seen_at: dict[bytes, float] = {}
        self._members: frozenset[bytes] = frozenset()
        self._members_read_at = float("-inf")
        self._uploaded: dict[bytes, int] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        try:
            await self._admit(scope, receive, send)
        except _Refused as refused:
            await _answer(send, refused.status, {"reason": refused.reason})

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        method, path = scope["method"], scope["path"]
        if path in FLEET_PATHS and method == "POST":
            await self._fleet(scope, receive, send)
        elif path == HEALTH_PATH and method in ("GET", "HEAD"):
            await _answer(send, 200, {"status": "ok"}, keep=True)
        elif path == ENROL_PATH and method == "POST":
            await self._enrolment(scope, receive, send)
        elif path == RENEW_PATH and method == "POST":
            await self._renewal(scope, receive, send)
        elif path == SUCCESSION_PATH and method == "GET":
            await _answer(send, 200, {"succession": self._succession})
        else:
            raise _Refused(404, "not-found")

    async def _fleet(self, scope: Scope, receive: Receive, send: Send) -> None:
        key = await self._member(scope)
        # Flower reads the whole body before it looks at the signature, so
        # holding it here first costs nothing and bounds it.
        body = await _read_body(scope, receive, self._max_request_bytes, _FLEET_BODY_TIMEOUT_S)
        path = scope["path"]
        if path == PUSH_MESSAGES:
            _check_sender(body)
        spent = self._uploaded.get(key, 0) + len(body) if path == PUSH_OBJECT else 0
        if spent > self._max_message_bytes:
            raise _Refused(413, "message-too-large")

        async def counted_send(event: MutableMapping[str, Any]) -> None:
            # A 200 proves the signature; until then the key is only a claim,
            # and a claim must not use up someone else's allowance.
            if event["type"] == "http.response.start" and event["status"] == 200:
                await self._note_seen(key)
                if path == PUSH_OBJECT:
                    self._uploaded[key] = self._uploaded.get(key, 0) + len(body)
                elif path == PUSH_MESSAGES:
                    self._uploaded[key] = 0
            await send(event)

        await self._flower(scope, _replay(body, receive), counted_send)

    async def _note_seen(self, key: bytes) -> None:
        now = time.monotonic()
        if now - self._seen_at.get(key, float("-inf")) > _SEEN_EVERY_S:
            self._seen_at[key] = now
            await asyncio.to_thread(self._saw, key)

    async def _member(self, scope: Scope) -> bytes:
        claimed = next((value for name, value in scope["headers"] if name == _KEY_HEADER), b"")
        try:
            key = base64.b64decode(claimed, validate=True)
        except binascii.Error as error:
            raise _Refused(401, "not-enrolled") from error
        now, stamp = time.monotonic(), self._member_stamp()
        if stamp != self._members_stamp or now - self._members_read_at > _MEMBERS_FRESH_S:
            self._members = await asyncio.to_thread(self._member_keys)
            # Only now: another request may have come while the keys were read.
            self._members_read_at, self._members_stamp = now, stamp
        if key not in self._members:
            raise _Refused(401, "not-enrolled")
        return key

    async def _renewal(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await self._body_of_a_stranger(scope, receive)
        try:
            answer = await asyncio.to_thread(self._renew, body.decode("utf-8", "replace"))
        except EnrolmentError as error:
            raise _Refused(403, "not-renewed") from error
        except FedpeftError as error:
            raise _Refused(503, error.reason) from error
        self._members_read_at = float("-inf")
        await _answer(send, 200, answer)

    async def _body_of_a_stranger(self, scope: Scope, receive: Receive) -> bytes:
        source = scope["client"][0] if scope.get("client") else ""
        if not self._limiter.allow(source, time.monotonic()):
            raise _Refused(429, "too-many-attempts")
        return await _read_body(scope, receive, _ENROL_MAX_BYTES, _ENROL_BODY_TIMEOUT_S)

    async def _enrolment(self, scope: Scope, receive: Receive, send: Send) -> None:
        fields = _enrolment_fields(await self._body_of_a_stranger(scope, receive))
        try:
            answer = await asyncio.to_thread(self._enrol, *fields)
        except InvitationRefused as error:
            raise _Refused(_REFUSAL_STATUS[error.refusal], error.refusal) from error
        except EnrolmentError as error:
            raise _Refused(400, "bad-key") from error
        except FedpeftError as error:
            raise _Refused(503, error.reason) from error
        self._members_read_at = float("-inf")
        await _answer(send, 200, answer)


def _enrolment_fields(body: bytes) -> tuple[str, str, str, str]:
    try:
        document = json.loads(body)
        token, public_key = document["token"], document["public_key"]
        identity, proof = document["identity"], document["proof"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _Refused(400, "bad-request") from error
    fields = (token, public_key, identity, proof)
    if not all(isinstance(field, str) for field in fields):
        raise _Refused(400, "bad-request")
    return fields


def _check_sender(body: bytes) -> None:
    """Refuse a reply in another clinic's name: Flower ties only the outer node id to the key."""
    request = PushMessagesRequest()
    try:
        request.ParseFromString(body)
    except DecodeError as error:
        raise _Refused(400, "bad-request") from error
    sources = [message.metadata.src_node_id for message in request.messages_list]
    if sources != [request.node.node_id] or len(request.message_object_trees) != 1:
        raise _Refused(400, "bad-request")


async def _read_body(scope: Scope, receive: Receive, max_bytes: int, timeout_s: float) -> bytes:
    declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
    if declared.isdigit() and int(declared) > max_bytes:
        raise _Refused(413, "request-too-large")
    try:
        async with asyncio.timeout(timeout_s):
            return await _collect(receive, max_bytes)
    except TimeoutError as error:
        raise _Refused(408, "too-slow") from error


async def _collect(receive: Receive, max_bytes: int) -> bytes:
    body = bytearray()
    more = True
    while more:
        event = await receive()
        if event["type"] == "http.disconnect":
            raise _Refused(400, "disconnected")
        body += event.get("body", b"")
        # Counted as it comes: a chunked body declares no length.
        if len(body) > max_bytes:
            raise _Refused(413, "request-too-large")
        more = event.get("more_body", False)
    return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    events = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> MutableMapping[str, Any]:
        return events.pop() if events else await receive()

    return replayed


async def _answer(
    send: Send, status: int, document: Mapping[str, str | list[str]], *, keep: bool = False
) -> None:
    body = json.dumps(document).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
    ]
    if not keep:
        # An unread body may follow; closing is cheaper than reading it.
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
