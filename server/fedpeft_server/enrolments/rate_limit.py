"""How often strangers may try to enrol: for one network, and for all together.

A token has 256 secret bits, so no limit is needed against guessing; it keeps the
processor and the enrolment file for those who were invited. Must not know HTTP.
"""

import ipaddress
from collections import deque
from typing import Final

PERIOD_S: Final = 60.0
_ALL_SOURCES: Final = 30
"""Times as many attempts as one network has, from all networks together."""
_IPV6_NETWORK_BITS: Final = 64
"""What a provider gives to one customer, who may take any address in it."""


class RateLimiter:
    """At most ``attempts`` in ``period_s`` seconds for one source, and few sources in memory."""

    def __init__(self, attempts: int, period_s: float, *, max_sources: int = 4096) -> None:
        self._attempts = attempts
        self._period_s = period_s
        self._max_sources = max_sources
        self._seen: dict[str, deque[float]] = {}

    def allow(self, source: str, now: float) -> bool:
        """Count one attempt at ``now`` (monotonic seconds) and say whether it may go on."""
        recent = self._seen.pop(source, None) or deque[float]()
        while recent and recent[0] <= now - self._period_s:
            recent.popleft()
        allowed = len(recent) < self._attempts
        if allowed:
            recent.append(now)
        # Re-inserting keeps the sources in order of their last attempt.
        self._seen[source] = recent
        while len(self._seen) > self._max_sources:
            del self._seen[next(iter(self._seen))]
        return allowed


class EnrolmentLimit:
    """At most ``attempts`` a minute from one network, and 30 times as many from all."""

    def __init__(self, attempts: int) -> None:
        self._one = RateLimiter(attempts, PERIOD_S)
        self._all = RateLimiter(attempts * _ALL_SOURCES, PERIOD_S)

    def allow(self, address: str, now: float) -> bool:
        """Count one attempt at ``now`` (monotonic seconds) and say whether it may go on."""
        return self._one.allow(network_of(address), now) and self._all.allow("", now)


def network_of(address: str) -> str:
    """Return what counts as one source: an IPv4 address, or the first half of an IPv6 one."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(found, ipaddress.IPv4Address):
        return str(found)
    if found.ipv4_mapped is not None:
        return str(found.ipv4_mapped)
    return str(ipaddress.ip_network((found, _IPV6_NETWORK_BITS), strict=False))
