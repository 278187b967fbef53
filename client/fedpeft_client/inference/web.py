"""The HTTP routes: read a request, let the engine answer, write the answer as it comes.

No content of a request or answer is logged, at any level.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from starlette.types import Message, Receive, Scope, Send

from fedpeft.errors import BadRequest, FedpeftError, PromptTooLong, UnknownAdapter
from fedpeft_client.inference.bridge import AsyncAnswer
from fedpeft_client.inference.engine import Answer, Engine, Piece
from fedpeft_client.inference.guard import Guard, Refusal
from fedpeft_client.inference.model_names import ModelNames
from fedpeft_client.inference.openai_format import (
    AnswerFormat,
    ChatRequest,
    TextRequest,
    error_format,
    model_format,
    models_format,
    parse_chat,
    parse_text,
)

_MOST_BODY_BYTES: Final = 1 << 20
_ONE_MODEL: Final = "/v1/models/"
"""What the address of one model begins with; its name follows."""
_BODY_S: Final = 20
"""How long the body of a request may take to arrive."""
_CLOSE: Final = ((b"connection", b"close"),)
"""A header of answers to requests of which the rest is not read."""
_SEND_S: Final = 60
"""How long a client may leave a part of its answer unread."""
_STATUS: Final[dict[type[FedpeftError], tuple[int, str]]] = {
    BadRequest: (400, "invalid_value"),
    PromptTooLong: (400, "context_length_exceeded"),
    UnknownAdapter: (404, "model_not_found"),
}


class _Refused(Exception):
    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.text)
        self.refusal = refusal


class _Gone(Exception):
    """The client closed the connection."""


@dataclass(frozen=True, kw_only=True)
class ServiceLimits:
    """Requests at a time, running and waiting; tokens of one answer."""

    requests: int
    max_tokens: int


class Service:
    """An ASGI application: ``/v1/chat/completions``, ``/v1/completions``, ``/v1/models``.

    And ``/v1/models/NAME``.
    """

    def __init__(
        self, engine: Engine, names: ModelNames, guard: Guard, limits: ServiceLimits
    ) -> None:
        self._engine, self._names, self._guard, self._limits = engine, names, guard, limits
        self._active = 0
        self._routes: dict[str, tuple[str, Callable[[Receive, Send], Awaitable[None]]]] = {
            "/v1/models": ("GET", self._list_models),
            "/v1/chat/completions": ("POST", self._chat),
            "/v1/completions": ("POST", self._complete),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        guarded = _timely(send)
        try:
            await self._route(scope)(receive, guarded)
        except _Refused as refused:
            await _send_error(guarded, refused.refusal)
        except FedpeftError as error:
            await _send_error(guarded, _refusal_of(error))
        except (_Gone, TimeoutError, OSError):
            return  # nobody reads any more

    def _route(self, scope: Scope) -> Callable[[Receive, Send], Awaitable[None]]:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in
                   scope["headers"]}  # fmt: skip
        if (refusal := self._guard.refusal(headers)) is not None:
            raise _Refused(refusal)
        method, handler = self._routes.get(scope["path"], ("", None))
        if handler is None and scope["path"].startswith(_ONE_MODEL):
            name = scope["path"].removeprefix(_ONE_MODEL)
            method, handler = "GET", partial(self._show_model, name)
        if handler is None:
            raise _Refused(
                Refusal(
                    404, "unknown_url",
                    f"there is no such address on this server, only {', '.join(self._routes)}",
                )
            )  # fmt: skip
        # HEAD is GET without a body, which the connection leaves out.
        if scope["method"] not in ((method, "HEAD") if method == "GET" else (method,)):
            allow = ((b"allow", b"GET, HEAD" if method == "GET" else method.encode()),)
            raise _Refused(
                Refusal(405, "method_not_allowed", f"use {method} for this address", allow)
            )
        if method == "POST":
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                raise _Refused(
                    Refusal(415, "unsupported_type", "send the request as application/json")
                )
        return handler

    async def _list_models(self, _receive: Receive, send: Send) -> None:
        await _send_json(send, 200, models_format(self._names.all(self._engine)))

    async def _show_model(self, name: str, _receive: Receive, send: Send) -> None:
        if name not in self._names.all(self._engine):
            raise self._names.explained(
                UnknownAdapter(f"this server has no model {name[:100]!r}"), self._engine
            )
        await _send_json(send, 200, model_format(name))

    async def _chat(self, receive: Receive, send: Send) -> None:
        request = parse_chat(await _body(receive))

        def begin() -> Answer:
            return self._engine.chat(
                request.turns(),
                model=self._names.version(request.model),
                options=request.sampling(self._limits.max_tokens),
            )

        await self._answer(request, begin, receive, send)

    async def _complete(self, receive: Receive, send: Send) -> None:
        request = parse_text(await _body(receive))

        def begin() -> Answer:
            return self._engine.complete(
                request.prompt[0],
                model=self._names.version(request.model),
                options=request.sampling(self._limits.max_tokens),
            )

        await self._answer(request, begin, receive, send)

    async def _answer(
        self,
        request: ChatRequest | TextRequest,
        begin: Callable[[], Answer],
        receive: Receive,
        send: Send,
    ) -> None:
        if self._active >= self._limits.requests:
            raise _Refused(
                Refusal(
                    503, "overloaded", "all places are taken: ask again in a few seconds",
                    ((b"retry-after", b"3"),),
                )
            )  # fmt: skip
        self._active += 1
        try:
            async with AsyncAnswer(await self._begun(begin)) as answer:
                form = AnswerFormat(
                    self._names.shown(answer.model), chat=isinstance(request, ChatRequest)
                )
                writing = _stream if request.stream else _whole
                await _unless_gone(receive, writing(answer, form, request, send))
        finally:
            self._active -= 1

    async def _begun(self, begin: Callable[[], Answer]) -> Answer:
        try:
            # Not in the loop: it waits for a step of the model.
            return await asyncio.to_thread(begin)
        except UnknownAdapter as error:
            raise self._names.explained(error, self._engine) from None


async def _whole(
    answer: AsyncAnswer, form: AnswerFormat, _request: ChatRequest | TextRequest, send: Send
) -> None:
    pieces = [piece async for piece in answer]
    text = "".join(piece.text for piece in pieces)
    await _send_json(send, 200, form.whole(text, pieces[-1]))


async def _stream(
    answer: AsyncAnswer, form: AnswerFormat, request: ChatRequest | TextRequest, send: Send
) -> None:
    # What fails before the first piece still gets a status of its own.
    piece: Piece | None = await anext(answer)
    headers = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-store")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    for chunk in form.first():
        await _send_event(send, chunk)
    try:
        while piece is not None:
            await _send_event(send, form.piece(piece))
            if piece.usage is not None and request.usage_in_stream:
                await _send_event(send, form.usage(piece.usage))
            piece = await anext(answer, None)
    except FedpeftError as error:
        refusal = _refusal_of(error)
        await _send_event(send, error_format(refusal.text, refusal.code, status=refusal.status))
    await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


async def _unless_gone(receive: Receive, writing: Awaitable[None]) -> None:
    """Write an answer until the client closes the connection.

    Raises:
        _Gone: it did.
    """
    answering = asyncio.ensure_future(writing)
    leaving = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            raise _Gone
        await answering
    finally:
        for task in (answering, leaving):
            task.cancel()
        await asyncio.gather(answering, leaving, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _body(receive: Receive) -> bytes:
    """Read the body of a request.

    Raises:
        _Refused: it is too large or too slow.
        _Gone: the client closed the connection.
    """
    body = bytearray()
    try:
        async with asyncio.timeout(_BODY_S):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise _Gone
                body += message.get("body", b"")
                if len(body) > _MOST_BODY_BYTES:
                    raise _Refused(
                        Refusal(
                            413, "request_too_large",
                            f"the request has more than {_MOST_BODY_BYTES} bytes: shorten it",
                            _CLOSE,
                        )
                    )  # fmt: skip
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError:
        raise _Refused(
            Refusal(408, "timeout", f"the request did not arrive within {_BODY_S} seconds", _CLOSE)
        ) from None


def _refusal_of(error: FedpeftError) -> Refusal:
    status, code = _STATUS.get(type(error), (500, error.reason))
    return Refusal(status, code, str(error))


async def _send_error(send: Send, refusal: Refusal) -> None:
    content = error_format(refusal.text, refusal.code, status=refusal.status)
    await _send_json(send, refusal.status, content, refusal.headers)


async def _send_json(
    send: Send,
    status: int,
    content: dict[str, Any],
    more: tuple[tuple[bytes, bytes], ...] = (),
) -> None:
    body = json.dumps(content).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"cache-control", b"no-store"),
        *more,
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _send_event(send: Send, content: dict[str, Any]) -> None:
    body = b"data: " + json.dumps(content).encode() + b"\n\n"
    await send({"type": "http.response.body", "body": body, "more_body": True})


def _timely(send: Send) -> Send:
    """Give up on clients that do not read."""

    async def timely(message: Message) -> None:
        async with asyncio.timeout(_SEND_S):
            await send(message)

    return timely
