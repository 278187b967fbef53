"""Connections that cost much and ask little must not keep others out.

uvicorn waits for the first request of a connection for ever, and the number of open files
is limited. So a connection without a running request is closed after a while, and when
there are too many, the oldest of those whose request has not wholly arrived at once.
What arrives is read by the thread that also sends everybody's answers, so no connection
may bring more work than one request is worth (:mod:`fedpeft_client.inference.frugal`).
"""

import asyncio
import json
import ssl
from typing import TYPE_CHECKING, Any, Final, Protocol

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from fedpeft_client.inference.frugal import LARGEST_HEAD_BYTES, FrugalConnection
from fedpeft_client.inference.openai_format import error_format

if TYPE_CHECKING:
    from uvicorn import Config
    from uvicorn.server import ServerState

IDLE_S: Final = 10
"""How long a connection may be open without a whole head of a request."""
MOST_CONNECTIONS: Final = 200


class _Connection(Protocol):
    @property
    def answering(self) -> bool: ...

    def drop(self) -> None: ...


_open: dict[_Connection, None] = {}
"""All connections of this process, in the order they were opened or last answered."""


def _keep_few() -> None:
    """Close the oldest connection without a whole request if there are too many."""
    if len(_open) > MOST_CONNECTIONS:
        oldest = next((each for each in _open if not each.answering), None)
        if oldest is not None:
            oldest.drop()


class PatientProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 with limits for idle connections and for work before an answer."""

    def __init__(
        self,
        config: "Config",
        server_state: "ServerState",
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.conn: FrugalConnection = FrugalConnection()
        self._deadline: asyncio.TimerHandle | None = None
        self._early: list[bytes] = []
        self._made = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request; close the oldest waiting one if there are too many."""
        super().connection_made(transport)
        self._made = True
        self._wait()
        _keep_few()
        while self._early and not transport.is_closing():
            self.data_received(self._early.pop(0))

    def data_received(self, data: bytes) -> None:
        """Take data; a request whose head is whole is watched by the application."""
        if not self._made:  # it came with the end of a TLS handshake
            self._early.append(data)
            return
        # In pieces, as h11 refuses only a head that is too large and still has no end.
        for start in range(0, len(data), LARGEST_HEAD_BYTES):
            super().data_received(data[start : start + LARGEST_HEAD_BYTES])
            if self.transport.is_closing():
                return
        if len(self.conn.trailing_data[0]) > LARGEST_HEAD_BYTES:
            self.drop()  # the next requests, sent before this one is answered, grow too large
        elif self.busy and self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def send_400_response(self, msg: str) -> None:
        """Refuse what h11 cannot read, with a sentence as programs read errors; then close."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.drop()  # an answer is on its way already: nothing can be said any more
            return
        status, text = self.conn.refusal
        body = json.dumps(error_format(text, "unreadable_request", status=status)).encode()
        headers = [
            ("content-type", "application/json"),
            ("content-length", str(len(body))),
            ("connection", "close"),
        ]
        for event in (
            h11.Response(status_code=status, headers=headers),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        super().on_response_complete()
        if not self.transport.is_closing():
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        if not self._made:
            return
        super().connection_lost(exc)
        if self._deadline is not None:
            self._deadline.cancel()
        _open.pop(self, None)

    @property
    def busy(self) -> bool:
        """Whether a request is being answered. (``cycle`` is None before the first one.)"""
        return bool(self.cycle) and not self.cycle.response_complete

    @property
    def answering(self) -> bool:
        """Whether a request that has wholly arrived is being answered."""
        return self.busy and not self.cycle.more_body

    def abandon(self) -> None:
        """Close the connection if no request runs on it."""
        if not self.busy:
            self.drop()

    def drop(self) -> None:
        """Close the connection whatever runs on it."""
        _open.pop(self, None)
        self.transport.abort()

    def _wait(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        _open.pop(self, None)
        _open[self] = None
        self._deadline = self.loop.call_later(IDLE_S, self.abandon)


class TlsDoor(asyncio.Protocol):
    """A connection up to the end of its TLS handshake, under the same limits.

    asyncio's own servers count a connection only from there on, and wait a minute for it.
    """

    answering = False

    def __init__(
        self,
        context: ssl.SSLContext,
        config: "Config",
        server_state: "ServerState",
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        self._context = context
        self._behind = PatientProtocol(config, server_state, app_state, _loop)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin the handshake."""
        self._transport = transport
        self._handshake = asyncio.get_running_loop().create_task(self._opened())
        _open[self] = None
        _keep_few()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection, which was closed before the handshake began."""
        _open.pop(self, None)

    def drop(self) -> None:
        """Close the connection."""
        _open.pop(self, None)
        self._handshake.cancel()
        self._transport.abort()

    async def _opened(self) -> None:
        try:
            secured = await asyncio.get_running_loop().start_tls(
                self._transport,
                self._behind,
                self._context,
                server_side=True,
                ssl_handshake_timeout=IDLE_S,
            )
        except OSError:  # of TLS too: whoever is there speaks no TLS, or has gone
            self._transport.abort()
            return
        finally:
            _open.pop(self, None)
        if secured is not None:
            self._behind.connection_made(secured)
