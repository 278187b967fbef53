"""Serve a box: engine, key, address, and an end that lets running answers finish."""

import contextlib
import signal
import socket
import ssl
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import uvicorn

from fedpeft.errors import ConfigError, PortInUse
from fedpeft_client.inference.api_key import load_api_key
from fedpeft_client.inference.connections import PatientProtocol, TlsDoor
from fedpeft_client.inference.guard import Guard, is_loopback
from fedpeft_client.inference.model_names import ModelNames
from fedpeft_client.inference.opening import Place, opened
from fedpeft_client.inference.prepared import Prepared
from fedpeft_client.inference.preparing import Apart, Outcome
from fedpeft_client.inference.prompts import context_line
from fedpeft_client.inference.web import Service, ServiceLimits

if TYPE_CHECKING:
    from fedpeft_client.inference.engine import Engine

KEY_FILE: Final = "api.key"
_FINISH_S: Final = 60
"""How long running answers may take to finish after the first Ctrl-C."""
_BACKLOG: Final = 256
"""Connections that are taken at once, before those that are too many can be closed."""

Tell = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Listening:
    """Where to listen: ``address`` None is ``inference.listen``; ``tls`` certificate and key."""

    address: str | None = None
    tls: tuple[Path, Path] | None = None


def serve_box(directory: Path, listening: Listening, *, tell: Tell) -> None:
    """Answer requests until a signal; ``tell`` is told what people should know.

    Raises:
        FedpeftError: the box, its key, its engine or the address cannot be used.
    """
    place = Place.at(directory)
    host, port = _address(listening.address or place.settings.inference.listen)
    key = None if is_loopback(host) else load_api_key(directory / KEY_FILE)
    tls = None if listening.tls is None else tls_context(*listening.tls)
    bound = _bound(host, port)
    apart = Apart(directory)
    try:
        engine = _engine(place, apart, tell)
        try:
            tell(context_line(engine.context, place.settings.inference.context))
            _announce(engine, bound, directory, key, listening, tell)
            _run(_application(engine, place, key), bound, tls, tell)
        finally:
            apart.stop()
            engine.close()
    finally:
        apart.stop()
        bound.close()


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or int(port) > 0xFFFF:
        raise ConfigError(f"cannot listen on {text!r}: write HOST:PORT, such as 127.0.0.1:8484")
    return host.strip("[]"), int(port)


def _bound(host: str, port: int) -> socket.socket:
    """Take the address before the model is loaded, which takes a while.

    Raises:
        PortInUse: it is taken, or not of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol is named, as asyncio sends small parts at once (TCP_NODELAY) only then.
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
        bound.listen(_BACKLOG)
    except OSError as error:
        bound.close()
        raise PortInUse(
            f"cannot listen on {host}:{port}: {(error.strerror or 'unknown host').lower()}; choose "
            "another address with --listen or inference.listen"
        ) from None
    return bound


def _engine(place: Place, apart: Apart, tell: Tell) -> "Engine":
    first = apart()
    tell(first.choice.why)
    ready: list[Outcome] = [first]

    def prepare() -> Prepared:
        outcome = ready.pop() if ready else apart()
        if outcome.prepared is None:
            raise ConfigError("the engine that client.toml asks for has changed: start again")
        return outcome.prepared

    return opened(place, first.choice, prepare, place.look, tell)


def _application(engine: "Engine", place: Place, key: str | None) -> Service:
    chosen = place.settings.inference
    return Service(
        engine,
        ModelNames(place.settings.clinic),
        Guard(key=key),
        ServiceLimits(requests=chosen.parallel + chosen.waiting, max_tokens=chosen.max_tokens),
    )


def _announce(
    engine: "Engine",
    bound: socket.socket,
    directory: Path,
    key: str | None,
    listening: Listening,
    tell: Tell,
) -> None:
    host, port = bound.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    scheme = "http" if listening.tls is None else "https"
    who = "programs on this machine" if key is None else f"whoever shows {directory / KEY_FILE}"
    tell(f"{engine.default} answers {who} on {scheme}://{shown}:{port}/v1; Ctrl-C stops")
    if key is not None and listening.tls is None:
        tell(
            "warning: without --certificate everybody on the network can read the key, the "
            "questions and the answers; give a certificate, or listen on 127.0.0.1 behind a "
            "proxy that encrypts"
        )


def _run(
    application: Service, bound: socket.socket, tls: ssl.SSLContext | None, tell: Tell
) -> None:
    # A partial does as well as a class, but uvicorn does not say so.
    front: Any = PatientProtocol
    if tls is not None:
        front = partial(TlsDoor, tls)
    config = uvicorn.Config(
        application,
        http=front,
        ws="none",
        lifespan="off",
        loop="asyncio",
        backlog=_BACKLOG,
        log_config=None,
        log_level="critical",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=_FINISH_S,
    )
    _Server(config, tell).run([bound])


def tls_context(certificate: Path, private_key: Path) -> ssl.SSLContext:
    """Return what a server needs for TLS.

    Raises:
        ConfigError: the files cannot be used.
    """
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(certificate, private_key)
    except OSError as error:
        raise ConfigError(
            f"the certificate {certificate} or its private key {private_key} cannot be used: "
            f"{_why(error)}; give PEM files that belong together"
        ) from None
    return context


def _why(error: OSError) -> str:
    if isinstance(error, ssl.SSLError):
        mismatch = error.reason == "KEY_VALUES_MISMATCH"
        return "they do not belong together" if mismatch else "they are no PEM, or damaged"
    return (error.strerror or "they cannot be read").lower()


class _Server(uvicorn.Server):
    """Says how it stops, and leaves the exit code to the program."""

    def __init__(self, config: uvicorn.Config, tell: Tell) -> None:
        super().__init__(config)
        self._tell = tell

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        """Let the first signal finish the running answers, and the second end at once."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self._stop) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, *_: object) -> None:
        if self.should_exit:
            self.force_exit = True
            return
        self.should_exit = True
        self._tell("stopping when the running answers are done; Ctrl-C again stops at once")
