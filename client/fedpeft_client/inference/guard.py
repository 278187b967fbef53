"""Who may ask: checked before anything of a request is read.

A page in a browser must not reach the server through its user's machine: pages of other
origins are refused, and on this machine so are requests by a name that is not this
machine's, behind which a page can hide (DNS rebinding).
"""

import hmac
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

_OWN_NAMES: Final = frozenset({"localhost", "127.0.0.1", "::1"})


@dataclass(frozen=True)
class Refusal:
    """An HTTP status, a word for programs and a sentence for people; maybe headers beside them."""

    status: int
    code: str
    text: str
    headers: tuple[tuple[bytes, bytes], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Guard:
    """Checks the headers of a request; ``key`` None: only this machine can reach the server."""

    key: str | None

    def refusal(self, headers: Mapping[str, str]) -> Refusal | None:
        """Return why a request is refused; names of headers are lower case."""
        host = headers.get("host", "")
        if self.key is None and _name(f"//{host}") not in _OWN_NAMES:
            return Refusal(
                403, "foreign_host",
                "this server answers to localhost and 127.0.0.1 only: use one of these names",
            )  # fmt: skip
        origin = headers.get("origin")
        crosses = headers.get("sec-fetch-site", "none") not in ("none", "same-origin")
        if crosses or (origin is not None and not _is_of(origin, host)):
            return Refusal(
                403, "foreign_origin",
                "pages of other sites may not ask this server: ask from a program instead",
            )  # fmt: skip
        if self.key is not None and not self._shows_key(headers.get("authorization", "")):
            return Refusal(
                401, "invalid_api_key",
                "the key is missing or wrong: send 'Authorization: Bearer KEY' with the content "
                "of api.key in the folder of the box",
            )  # fmt: skip
        return None

    def _shows_key(self, header: str) -> bool:
        kind, _, shown = header.partition(" ")
        # Compared in a time that does not depend on how much of it is right.
        right = hmac.compare_digest(shown.strip().encode(), (self.key or "").encode())
        return right and kind.lower() == "bearer"


def is_loopback(host: str) -> bool:
    """Say whether only this machine can reach a server that listens on ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _is_of(origin: str, host: str) -> bool:
    try:
        return urlsplit(origin).netloc == host
    except ValueError:  # such as "http://["
        return False


def _name(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None
