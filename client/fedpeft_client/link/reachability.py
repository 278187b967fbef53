"""Find out whether the server can be reached and trusted, before anything depends on it."""

import time
from dataclasses import dataclass
from pathlib import Path

from fedpeft_client.link.fleet import Clock, check_skew, measure, open_http, read_ca


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What a successful probe found.

    ``clock_skew_s`` is by how many seconds this machine's clock is ahead of the
    server's (negative: behind), known to about one second. ``latency_s`` is how
    long connecting and asking took.
    """

    ok: bool
    clock_skew_s: float
    latency_s: float


def probe(server: str, ca: Path, *, clock: Clock = time.time) -> Probe:
    """Connect to ``server`` (``host:port``) over TLS, trusting only the CA in ``ca``.

    Raises:
        ConnectionFailed: nothing answers, or something else does.
        CertificateRefused: what answers has no certificate of the CA.
        ClockSkew: the clocks differ by more than signed messages allow.
        EnrolmentError: the CA file is missing or damaged.
    """
    with open_http(read_ca(ca)) as http:
        skew_s, latency_s = measure(http, server, clock)
    check_skew(skew_s)
    return Probe(ok=True, clock_skew_s=skew_s, latency_s=latency_s)
