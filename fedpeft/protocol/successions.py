"""How clinics came to their identities, as it travels beside the list of a sum's clinics.

A field of the sealed message that brings a roster (``train.shares``, ``evaluate.shares``): a
JSON object of clinic names, each with its links in base64, the oldest first; left out where
there is none. Whether a link is right is judged by who pinned the key that it begins with.
"""

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from typing import Any, Final, cast

from fedpeft.errors import SealingError
from fedpeft.protocol.payload import Payload, Value
from fedpeft.sealing.succession import LINK_BYTES, MOST_LINKS, Link
from fedpeft.secagg.threshold import MOST_CLINICS

SUCCESSIONS: Final = "successions"
Links = Mapping[str, tuple[bytes, ...]]
"""By clinic; each link in the form of ``fedpeft.sealing.succession.Link``."""


def successions_field(links: Links, keys: Mapping[str, bytes]) -> dict[str, Value]:
    """Return the field with the links that lead to the signing keys of a sum's clinics.

    Where a clinic has gone on to another key since it was asked, what leads there is left out.
    """
    told = {name: _leading(links.get(name, ()), key) for name, key in sorted(keys.items())}
    texts = {
        name: [base64.b64encode(link).decode("ascii") for link in leading]
        for name, leading in told.items()
        if leading
    }
    return {SUCCESSIONS: json.dumps(texts, separators=(",", ":"))} if texts else {}


def successions_of(payload: Payload, *, source: str) -> dict[str, tuple[bytes, ...]]:
    """Return what :func:`successions_field` put into a message; nothing where it is left out.

    Raises:
        SealingError: it is not in that form, or names too many clinics or links.
    """
    if SUCCESSIONS not in payload.fields:
        return {}
    try:
        content: Any = json.loads(payload.text(SUCCESSIONS, source=source))
        if not isinstance(content, dict):
            raise TypeError
        told = cast("dict[str, list[str]]", content)
        links = {name: tuple(_link(text) for text in texts) for name, texts in told.items()}
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise _unreadable(source) from None
    if len(links) > MOST_CLINICS or any(len(each) > MOST_LINKS for each in links.values()):
        raise _unreadable(source)
    return links


def _leading(links: Sequence[bytes], key: bytes) -> Sequence[bytes]:
    for at, link in enumerate(links):
        if Link.from_bytes(link).new == key:
            return links[: at + 1]
    return ()


def _link(text: str) -> bytes:
    data = binascii.a2b_base64(text.encode("ascii"), strict_mode=True)
    if len(data) != LINK_BYTES:
        raise ValueError
    return data


def _unreadable(source: str) -> SealingError:
    return SealingError(
        f"{source} does not say in the form of this release how clinics renewed their keys: the "
        "message is not used; install the same fedpeft release on both sides"
    )
