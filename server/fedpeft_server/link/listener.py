"""One TLS socket with a uvicorn server behind it, in a thread of this process."""

import asyncio
import errno
import socket
import ssl
import threading
import time
from collections.abc import Callable
from typing import Any

import uvicorn

from fedpeft.errors import ConnectionFailed, PortInUse, StorageError
from fedpeft_server.site.pki import Authority

_START_TIMEOUT_S = 15.0
_DRAIN_S = 2
_STOP_TIMEOUT_S = 8.0
# Far above what the clinics of a federation open; beyond it uvicorn answers 503.
_MAX_CONNECTIONS = 1024


def bind(host: str, port: int) -> socket.socket:
    """Return a listening TCP socket; port 0 lets the system choose one.

    Raises:
        PortInUse: another program listens there.
        ConnectionFailed: the host is not an address of this machine, or the
            port is reserved for the system administrator.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, protocol)
    except OSError as error:
        raise _cannot_listen(host, port, error) from error
    try:
        # Without this a restart would wait a minute for old connections to fade.
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(128)
    except OSError as error:
        listening.close()
        raise _cannot_listen(host, port, error) from error
    return listening


def _cannot_listen(host: str, port: int, error: OSError) -> ConnectionFailed:
    if error.errno == errno.EADDRINUSE:
        return PortInUse(
            f"port {port} on {host} is already in use, perhaps by another fedpeft-server: "
            "stop that program, or choose another port"
        )
    return ConnectionFailed(
        f"the server cannot listen on {host} port {port} ({error.strerror}): "
        "use 0.0.0.0 or an address of this machine, and a port above 1023"
    )


def tls_context(authority: Authority) -> ssl.SSLContext:
    """Return the server's TLS settings: version 1.3 only, own certificate.

    Raises:
        StorageError: certificate and key do not belong together.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        context.load_cert_chain(authority.server_certificate, authority.server_key)
    except ssl.SSLError as error:
        raise StorageError(
            f"{authority.server_certificate} and {authority.server_key} cannot be used together "
            f"({error.reason}): make them anew with `fedpeft-server rotate`, or put both files of "
            "the hospital's CA there"
        ) from error
    return context


class Listener:
    """Serves an ASGI application on a bound socket until stopped."""

    def __init__(
        self,
        app: Callable[..., Any],
        bound: socket.socket,
        *,
        tls: ssl.SSLContext,
        protocol: type[asyncio.Protocol],
    ) -> None:
        self._socket = bound
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                http=protocol,
                loop="asyncio",
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="warning",
                access_log=False,
                # The peer's address must be the socket's, not a header's.
                proxy_headers=False,
                server_header=False,
                limit_concurrency=_MAX_CONNECTIONS,
                timeout_graceful_shutdown=_DRAIN_S,
                ssl_context_factory=lambda _config, _default: tls,
            )
        )
        self._thread = threading.Thread(target=self._serve, name="fedpeft-public", daemon=True)

    @property
    def port(self) -> int:
        """The TCP port that is listened on."""
        return int(self._socket.getsockname()[1])

    def start(self) -> None:
        """Start serving; returns when connections are answered.

        Raises:
            ConnectionFailed: the server thread did not come up.
        """
        self._thread.start()
        patience = time.monotonic() + _START_TIMEOUT_S
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > patience:
                raise ConnectionFailed(
                    "the network server did not start, see the log for the reason"
                )
            time.sleep(0.01)

    def stop(self) -> None:
        """Stop serving, letting requests in flight finish for two seconds."""
        self._server.should_exit = True
        if self._thread.is_alive():
            self._thread.join(_STOP_TIMEOUT_S)
        self._socket.close()

    def _serve(self) -> None:
        self._server.run(sockets=[self._socket])
