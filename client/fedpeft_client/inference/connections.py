"""Connections that are opened and left must not keep others out.

uvicorn waits for the first request of a connection for ever, and the number of open files
is limited. So a connection without a running request is closed after a while, and when
there are too many, the oldest of those whose request has not wholly arrived at once.
"""

import asyncio
from typing import TYPE_CHECKING, Any, Final

from uvicorn.protocols.http.h11_impl import H11Protocol

if TYPE_CHECKING:
    from uvicorn import Config
    from uvicorn.server import ServerState

IDLE_S: Final = 10
"""How long a connection may be open without a whole head of a request."""
MOST_CONNECTIONS: Final = 200

_open: "dict[PatientProtocol, None]" = {}
"""All connections of this process, in the order they were opened or last answered."""


class PatientProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 with a limit for idle connections."""

    def __init__(
        self,
        config: "Config",
        server_state: "ServerState",
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request; close the oldest waiting one if there are too many."""
        super().connection_made(transport)
        self._wait()
        if len(_open) > MOST_CONNECTIONS:
            oldest = next((each for each in _open if not each.answering), None)
            if oldest is not None:
                oldest.drop()

    def data_received(self, data: bytes) -> None:
        """Take data; a request whose head is whole is watched by the application."""
        super().data_received(data)
        if self.busy and self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        super().on_response_complete()
        if not self.transport.is_closing():
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
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
