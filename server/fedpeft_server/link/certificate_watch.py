"""Let a running server show a renewed certificate without dropping a connection.

Connections that are open keep the certificate they began with; new ones get the new one.
"""

import logging
import ssl
import threading
from typing import Final

from fedpeft_server.site.pki import Authority

_EVERY_S: Final = 15.0
_LOG: Final = logging.getLogger(__name__)


class CertificateWatch:
    """Looks at the certificate's file now and then, in a thread of its own."""

    def __init__(
        self, tls: ssl.SSLContext, authority: Authority, every_s: float = _EVERY_S
    ) -> None:
        self._tls = tls
        self._authority = authority
        self._every_s = every_s
        self._stop = threading.Event()
        self._loaded = self._state()
        self._thread = threading.Thread(target=self._look, name="fedpeft-tls", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self) -> None:
        """End it."""
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._stop.wait(self._every_s):
            state = self._state()
            if state == self._loaded:
                continue
            try:
                self._tls.load_cert_chain(
                    self._authority.server_certificate, self._authority.server_key
                )
            except (ssl.SSLError, OSError) as error:
                # Half of it may be written only now; the next look will tell.
                _LOG.warning("the renewed certificate cannot be used yet: %s", error)
                continue
            self._loaded = state

    def _state(self) -> tuple[int, ...]:
        found: list[int] = []
        for path in (self._authority.server_certificate, self._authority.server_key):
            try:
                status = path.stat()
            except FileNotFoundError:
                return ()
            found += [status.st_mtime_ns, status.st_ino, status.st_size]
        return tuple(found)
