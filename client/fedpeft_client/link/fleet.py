"""Speak to the server over TLS: what is trusted, how calls are signed, what errors mean.

One :class:`FleetClient` holds one connection pool. It trusts the federation's
CA alone, uses no proxy, follows no redirect and bounds every answer.
"""

import base64
import datetime
import ssl
import time
from collections.abc import Callable, Iterator
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from pathlib import Path
from typing import Final

import httpx
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_HEADER, TIMESTAMP_TOLERANCE
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext
from flwr.supernode.fleet_http_client import FleetHttpClient

from fedpeft.errors import (
    CertificateRefused,
    ClockSkew,
    ConfigError,
    ConnectionFailed,
    EnrolmentError,
    FedpeftError,
    SizeLimit,
)
from fedpeft_client.limits.traffic import TrafficMeter

Clock = Callable[[], float]
"""Seconds since the epoch, as this machine believes them."""

# An object comes in parts of 5 MB; nothing legitimate is near this.
_MAX_RESPONSE_BYTES: Final = 64 << 20
_SHORT_BYTES: Final = 64 << 10
_HTTP_LINE: Final = "HTTP/1.1 200 \r\n"
_TIMEOUT: Final = httpx.Timeout(60.0, connect=5.0)
# The server's Date header has whole seconds, so a skew is known to about one.
_DATE_RESOLUTION_S: Final = 1.0
_MAX_AHEAD_S: Final = SYSTEM_TIME_TOLERANCE - _DATE_RESOLUTION_S / 2
_MAX_BEHIND_S: Final = TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE - _DATE_RESOLUTION_S / 2

_EXPIRED_OR_NOT_YET: Final = (9, 10)  # OpenSSL's X509_V_ERR_CERT_NOT_YET_VALID, _HAS_EXPIRED
_HOSTNAME_MISMATCH: Final = (62, 64)  # X509_V_ERR_HOSTNAME_MISMATCH, _IP_ADDRESS_MISMATCH


def trust_only(ca_pem: str) -> ssl.SSLContext:
    """Return TLS settings that accept certificates of this CA and no other.

    Raises:
        EnrolmentError: ``ca_pem`` is no certificate.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    try:
        context.load_verify_locations(cadata=ca_pem)
    except (ssl.SSLError, ValueError) as error:
        raise EnrolmentError(
            "the CA certificate is damaged: use a fresh copy of the invitation"
        ) from error
    return context


def url_of(server: str) -> str:
    """Return the server's URL.

    Raises:
        ConfigError: ``server`` is not ``host:port``.
    """
    try:
        url = httpx.URL(f"https://{server}")
        sound = bool(url.host) and url.port is not None and url.netloc == server.encode("ascii")
    except (httpx.InvalidURL, ValueError):
        sound = False
    if not sound:
        raise ConfigError(
            f"the server address {server!r} is not host:port: "
            "use the address of the invitation, for example fl.hospital.example:8443"
        )
    return f"https://{server}"


def read_ca(path: Path) -> str:
    """Return the text of the CA certificate that joining left.

    Raises:
        EnrolmentError: the file cannot be read.
    """
    try:
        return path.read_text("ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise EnrolmentError(
            f"the CA certificate {path} cannot be read, so the server cannot be "
            "recognised: join the federation first"
        ) from error


def load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Return the clinic's private key.

    Raises:
        EnrolmentError: the file is missing, damaged, open to others or not a P-384 key.
    """
    try:
        if path.stat().st_mode & 0o077:
            raise EnrolmentError(
                f"the key {path} can be read by other users of this machine: run `chmod 600 {path}`"
            )
        key = serialization.load_pem_private_key(path.read_bytes(), None)
    except OSError as error:
        raise EnrolmentError(
            f"the key {path} cannot be read ({error.strerror}): join the federation first"
        ) from error
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise EnrolmentError(
            f"the key {path} is damaged: ask for a new invitation and join in another directory"
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP384R1):
        raise EnrolmentError(
            f"the key {path} is not on the curve P-384: join the federation with this program"
        )
    return key


def open_http(ca_pem: str, meter: TrafficMeter | None = None) -> httpx.Client:
    """Return an HTTPS client for this federation's server only.

    ``trust_env=False`` on client and transport keeps proxy, netrc and
    certificate variables of the environment out of it. ``meter`` counts every byte.

    Raises:
        EnrolmentError: ``ca_pem`` is no certificate.
    """
    return httpx.Client(
        transport=_BoundedTransport(trust_only(ca_pem), meter),
        trust_env=False,
        follow_redirects=False,
        timeout=_TIMEOUT,
    )


class _BoundedTransport(httpx.HTTPTransport):
    def __init__(self, tls: ssl.SSLContext, meter: TrafficMeter | None) -> None:
        super().__init__(verify=tls, trust_env=False)
        self._meter = meter

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        if self._meter is not None:
            body = int(request.headers.get("content-length", "0"))
            head = len(request.method) + len(request.url.raw_path) + len(_HTTP_LINE)
            self._meter.count(head + _size(request.headers) + body)
        response = super().handle_request(request)
        if self._meter is not None:
            self._meter.count(len(_HTTP_LINE) + _size(response.headers))
        if isinstance(response.stream, httpx.SyncByteStream):
            response.stream = _BoundedStream(response.stream, self._meter)
        return response


def _size(headers: httpx.Headers) -> int:
    return sum(len(name) + len(value) + len(": \r\n") for name, value in headers.raw) + 2


class _BoundedStream(httpx.SyncByteStream):
    def __init__(self, stream: httpx.SyncByteStream, meter: TrafficMeter | None) -> None:
        self._stream = stream
        self._meter = meter

    def __iter__(self) -> Iterator[bytes]:
        received = 0
        for part in self._stream:
            received += len(part)
            if self._meter is not None:
                self._meter.count(len(part))
                # A short answer always passes: it is how a refusal gets to the server.
                if received > _SHORT_BYTES and self._meter.left() == 0:
                    raise self._meter.refusal()
            if received > _MAX_RESPONSE_BYTES:
                raise SizeLimit(
                    f"the server sent an answer above {_MAX_RESPONSE_BYTES} bytes, "
                    "which no fedpeft server does: tell the central site"
                )
            yield part

    def close(self) -> None:
        self._stream.close()


class _Signer:
    """Flower's signature of a call: the present time, signed by the clinic's key."""

    def __init__(self, key: ec.EllipticCurvePrivateKey, clock: Clock) -> None:
        self._clock = clock
        self.take(key)

    def take(self, key: ec.EllipticCurvePrivateKey) -> None:
        self._key = key
        self._public = base64.b64encode(public_key_to_bytes(key.public_key())).decode("ascii")

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        moment = datetime.datetime.fromtimestamp(self._clock(), datetime.UTC).isoformat()
        signature = sign_message(self._key, moment.encode("ascii"))
        context.request.headers[FLEET_HTTP_PUBLIC_KEY_HEADER] = self._public
        context.request.headers[TIMESTAMP_HEADER] = moment
        context.request.headers[FLEET_HTTP_SIGNATURE_HEADER] = base64.b64encode(signature).decode(
            "ascii"
        )
        return call_next(context)


class FleetClient(FleetHttpClient):
    """Flower's calls from a clinic, one attempt each; the caller decides on retries."""

    def __init__(
        self, server: str, http: httpx.Client, key: ec.EllipticCurvePrivateKey, clock: Clock
    ) -> None:
        # Flower's own __init__ is left out, as it builds an HTTP client that
        # obeys proxy variables, and a retry loop that kills the process.
        self._base_url = url_of(server)
        self._signer = _Signer(key, clock)
        self._interceptors = (
            RuntimeVersionHttpInterceptor(component_name="SuperNode"),
            self._signer,
        )
        self._retry_invoker = None
        self._client = http

    def sign_with(self, key: ec.EllipticCurvePrivateKey) -> None:
        """Sign later calls with a key that took the place of the first one."""
        self._signer.take(key)

    def hurry(self, timeout_s: float) -> None:
        """Allow later calls only this long."""
        self._client.timeout = httpx.Timeout(timeout_s)


def measure(http: httpx.Client, server: str, clock: Clock = time.time) -> tuple[float, float]:
    """Ask the server for the time.

    Returns:
        The seconds by which this machine's clock is ahead of the server's
        (negative: behind; known to about one second), and the seconds that
        the question took.

    Raises:
        ConfigError: ``server`` is not ``host:port``.
        CertificateRefused: the server is not the one of the invitation.
        ConnectionFailed: nothing answers, or what answers is no fedpeft server.
    """
    started, asked = time.monotonic(), clock()
    try:
        response = http.get(f"{url_of(server)}/health")
    except httpx.TransportError as error:
        raise explain(error, server) from error
    latency_s = time.monotonic() - started
    try:
        told = parsedate_to_datetime(response.headers["date"]).timestamp()
    except (KeyError, ValueError) as error:
        raise not_a_server(server) from error
    if response.status_code != HTTPStatus.OK:
        raise not_a_server(server)
    return asked + latency_s / 2 - (told + _DATE_RESOLUTION_S / 2), latency_s


def check_skew(skew_s: float) -> None:
    """Raise ClockSkew when signed calls would be refused for their time.

    The server accepts a clock that is up to 5 s ahead or 305 s behind its own.
    """
    if -_MAX_BEHIND_S <= skew_s <= _MAX_AHEAD_S:
        return
    direction = "ahead of" if skew_s > 0 else "behind"
    raise ClockSkew(
        f"the clock of this machine is {abs(skew_s):.0f} s {direction} the server's, "
        "so its messages are refused: set the clock, for example by switching NTP on, "
        "and start again"
    )


def explain(error: httpx.TransportError, server: str) -> FedpeftError:
    """Say in one sentence why the connection failed."""
    cause = _tls_cause(error)
    if isinstance(cause, ssl.SSLCertVerificationError):
        return CertificateRefused(_certificate_sentence(cause, server))
    if cause is not None:
        return CertificateRefused(
            f"what answers at {server} does not speak TLS 1.3 as a fedpeft server does: "
            "check the address, and that no proxy or firewall opens the connection"
        )
    return ConnectionFailed(
        f"the server {server} cannot be reached ({type(error).__name__}): check that it runs, "
        "the address, and that the firewall lets this machine out to that port"
    )


def not_a_server(server: str) -> ConnectionFailed:
    """Return the error for an answer that no fedpeft server gives."""
    return ConnectionFailed(
        f"what answers at {server} is not a fedpeft server: check the address and the port"
    )


def _certificate_sentence(cause: ssl.SSLCertVerificationError, server: str) -> str:
    if cause.verify_code in _EXPIRED_OR_NOT_YET:
        return (
            f"the certificate of {server} is not valid at this machine's time: "
            "check the clock here, else ask the central site to renew the certificate"
        )
    if cause.verify_code in _HOSTNAME_MISMATCH:
        return (
            f"the certificate of the server is not made out to {server}: "
            "use the address of the invitation"
        )
    return (
        f"the certificate of {server} was not issued by the federation's own CA, so this may "
        "be another server or an interception: check the address and tell the central site"
    )


def _tls_cause(error: BaseException) -> ssl.SSLError | None:
    """Find the TLS failure below an HTTP error; a mere broken connection is none."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, ssl.SSLError):
            broken = isinstance(seen, ssl.SSLEOFError | ssl.SSLZeroReturnError)
            return None if broken else seen
        seen = seen.__cause__ or seen.__context__
    return None
