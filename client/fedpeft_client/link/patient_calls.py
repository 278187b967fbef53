"""Calls to the server that outlive outages: repeated with growing pauses until they succeed.

Or until the server says that they never will, or the stop event is set. Says once that the
server cannot be reached, and once that it is back. Must not know what is called.
"""

import secrets
import threading
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from typing import Final, TypeVar

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.supercore.error import FlowerError
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from fedpeft.errors import CertificateRefused, ConnectionFailed, EnrolmentError
from fedpeft.watchdog import came_round
from fedpeft_client.keys.key_life import renewal_in_progress
from fedpeft_client.link.fleet import Clock, FleetClient, check_skew, explain, load_key, measure

_FIRST_PAUSE_S: Final = 0.5
_LONGEST_PAUSE_S: Final = 30.0
_OUTAGE_STATUSES: Final = frozenset({429, 502, 503, 504})
# Flower answers 500 when its database is busy, which passes, but also when a
# message can never be stored, which does not.
_TRIES_AT_500: Final = 8

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")


class Stopped(Exception):
    """The stop event was set while a call was under way."""


class RunEnded(Exception):
    """The server no longer takes part in the run of this message."""


class MessageLost(Exception):
    """A message or reply cannot be transferred; the next one may well be."""


class Rejected(MessageLost):
    """The server refused a call for good; ``code`` is Flower's, or None."""

    def __init__(self, status: int, code: int | None) -> None:
        super().__init__(f"the server answered HTTP {status}")
        self.code = code


class PatientCalls:
    """One clinic's calls over ``client``, signed by the key in ``key_file``; thread-safe."""

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
    ) -> None:
        """Prepare; nothing is sent.

        ``on_outage`` is told in a sentence when the server cannot be reached, once, and
        ``on_recovery`` when it can be again, in the thread that called.
        """
        self._client = client
        self._http = http
        self._server = server
        self._key_file = key_file
        self._stop = stop
        self._clock = clock
        self._on_outage = on_outage
        self._on_recovery = on_recovery
        self._reachable = True
        self._lock = threading.Lock()
        self.public_key = public_key_to_bytes(key.public_key())
        """The key that signs, PEM."""
        self.recovered = threading.Event()
        """Set when an outage has ended; whoever waits for it clears it."""

    @property
    def reachable(self) -> bool:
        """Whether the last call got through."""
        return self._reachable

    def call(self, method: Callable[[_Request], _Response], request: _Request) -> _Response:
        """Call until it succeeds, and return the answer.

        Raises:
            Stopped: the stop event was set first.
            RunEnded, MessageLost: the server will never do it.
            EnrolmentError: the server does not know the key.
            ClockSkew, CertificateRefused: see :mod:`fedpeft_client.link.fleet`.
        """
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
            self.pause(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    def pause(self, seconds: float) -> None:
        """Wait for between a half and the whole of ``seconds``, by chance.

        Many clinics lose the server at the same moment and should not all come back at the
        same moment.

        Raises:
            Stopped: the stop event was set meanwhile.
        """
        jitter = 0.5 + secrets.randbelow(1000) / 2000
        if self._stop.wait(seconds * jitter):
            raise Stopped

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
        raise Rejected(status, None if error is None else error.code)

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
        if public == self.public_key:
            return renewal_in_progress(self._key_file).exists()
        self.public_key = public
        self._client.sign_with(key)
        return True

    def _note_outage(self, trouble: str) -> None:
        with self._lock:
            known, self._reachable = not self._reachable, False
        if not known:
            self._on_outage(trouble)

    def _note_recovery(self) -> None:
        with self._lock:
            known, self._reachable = self._reachable, True
        if not known:
            self.recovered.set()
            self._on_recovery()
