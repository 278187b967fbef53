"""Count what crosses the public socket: HTTP bytes with headers, after decryption.

TLS adds about 22 bytes a record (at most 16 KiB) and a handshake a connection.
"""

import asyncio
import threading
from typing import Any, Final, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_FAREWELL_S: Final = 0.1
_DRAIN_S: Final = 1.5


class WireMeter:
    """Two counters that only grow; safe to read from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._up = 0
        self._down = 0

    @property
    def bytes_up(self) -> int:
        """Bytes received from clinics (and from anyone else who knocked)."""
        return self._up

    @property
    def bytes_down(self) -> int:
        """Bytes sent to clinics."""
        return self._down

    def add(self, *, up: int = 0, down: int = 0) -> None:
        """Count bytes that were received (``up``) or sent (``down``)."""
        with self._lock:
            self._up += up
            self._down += down


class _CountingTransport:
    """An asyncio transport that counts what is written through it."""

    def __init__(self, transport: asyncio.Transport, meter: WireMeter) -> None:
        self._transport = transport
        self._meter = meter

    def write(self, data: bytes) -> None:
        self._meter.add(down=len(data))
        self._transport.write(data)

    def close(self) -> None:
        # A second close makes asyncio's TLS transport forget how to abort, and
        # uvicorn closes an idle connection again when it stops.
        if not self._transport.is_closing():
            self._transport.close()

    def writelines(self, lines: list[bytes]) -> None:
        self.write(b"".join(lines))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


def metered_protocol(meter: WireMeter) -> type[asyncio.Protocol]:
    """Return uvicorn's HTTP protocol, with every byte counted by ``meter``."""

    class MeteredProtocol(HttpToolsProtocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            counting = _CountingTransport(transport, meter)
            super().connection_made(cast(asyncio.Transport, counting))

        def shutdown(self) -> None:
            super().shutdown()
            # Over TLS, closing waits half a minute for a farewell that an idle
            # client does not send, and the server would stop only then.
            patience_s = _FAREWELL_S if self.transport.is_closing() else _DRAIN_S
            self.loop.call_later(patience_s, self.transport.abort)

        def data_received(self, data: bytes) -> None:
            meter.add(up=len(data))
            super().data_received(data)

    return MeteredProtocol
