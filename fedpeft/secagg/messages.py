"""The messages of a secure sum as bytes; clinics are numbered by their place in the roster.

Compact and strict: what is too long, too short or not in the one canonical form
is refused. Specified in docs/spec/secure-aggregation.md.
"""

import hashlib
import re
import struct
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from fedpeft.errors import AggregationRefused, InconsistentLists
from fedpeft.sealing.identity import KEY_BYTES, SIGNATURE_BYTES
from fedpeft.secagg.pairwise import TAG_BYTES
from fedpeft.secagg.session import HINT_BYTES, Session
from fedpeft.secagg.shamir import SHARE_BYTES
from fedpeft.secagg.threshold import MOST_CLINICS

BOX_BYTES: Final = 2 * SHARE_BYTES + TAG_BYTES
"""One clinic's two shares for another, encrypted."""
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_COUNTS: Final = struct.Struct("<HH")
_ADVERT: Final = struct.Struct(f"<{HINT_BYTES}s{KEY_BYTES}s{KEY_BYTES}s{SIGNATURE_BYTES}s")


@dataclass(frozen=True, slots=True)
class Advert:
    """A clinic's fresh public keys for one session, signed with its identity (``train.keys``)."""

    hint: bytes
    share_key: bytes
    mask_key: bytes
    signature: bytes

    def to_bytes(self) -> bytes:
        """Return 136 bytes."""
        return _ADVERT.pack(self.hint, self.share_key, self.mask_key, self.signature)

    @classmethod
    def from_bytes(cls, data: bytes) -> "Advert":
        """Read what :meth:`to_bytes` wrote.

        Raises:
            AggregationRefused: it has another length.
        """
        _require_length(data, _ADVERT.size, "keys")
        return cls(*_ADVERT.unpack(data))


def advert_statement(session: Session, name: str, share_key: bytes, mask_key: bytes) -> bytes:
    """Return what a clinic signs about its keys."""
    return b"fedpeft keys\x00" + session.digest + share_key + mask_key + name.encode()


@dataclass(frozen=True, slots=True)
class Entry:
    """One clinic in the roster; ``signing`` is its Ed25519 identity, 32 bytes."""

    name: str
    signing: bytes
    advert: Advert


@dataclass(frozen=True)
class Roster:
    """Everybody who advertised keys, sorted by name, and the threshold (``train.shares``).

    Raises:
        InconsistentLists: names are not distinct, sorted and well formed.
    """

    threshold: int
    entries: tuple[Entry, ...]

    def __post_init__(self) -> None:
        names = [entry.name for entry in self.entries]
        if names != sorted(set(names)) or not all(_NAME.fullmatch(name) for name in names):
            raise InconsistentLists(
                "the server's list of clinics names one twice or is not in order: the round is left"
            )

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The clinics' names in order."""
        return tuple(entry.name for entry in self.entries)

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the roster's bytes."""
        return hashlib.sha256(self.to_bytes()).digest()

    def place(self, name: str) -> int:
        """Return the number of a clinic, from 0."""
        return self.names.index(name)

    def to_bytes(self) -> bytes:
        """Return counts, then for each clinic name, identity and keys."""
        parts = [_COUNTS.pack(self.threshold, len(self.entries))]
        for entry in self.entries:
            name = entry.name.encode()
            parts += [bytes([len(name)]), name, entry.signing, entry.advert.to_bytes()]
        return b"".join(parts)

    @classmethod
    def from_bytes(cls, data: bytes) -> "Roster":
        """Read what :meth:`to_bytes` wrote.

        Raises:
            AggregationRefused: it is not a roster.
            InconsistentLists: names are not distinct and sorted.
        """
        reader = _Reader(data, "list of clinics")
        threshold, count = _COUNTS.unpack(reader.take(_COUNTS.size))
        if count > MOST_CLINICS:
            raise AggregationRefused(f"the server lists {count} clinics, over {MOST_CLINICS}")
        entries: list[Entry] = []
        for _ in range(count):
            name = reader.take(reader.take(1)[0]).decode("ascii", errors="replace")
            signing, advert = reader.take(KEY_BYTES), reader.take(_ADVERT.size)
            entries.append(Entry(name, signing, Advert.from_bytes(advert)))
        reader.end()
        return cls(threshold, tuple(entries))


@dataclass(frozen=True, slots=True)
class Shares:
    """A clinic's shares for the others in the roster's order, and a commitment (its answer)."""

    commitment: bytes
    boxes: tuple[bytes, ...]

    def to_bytes(self) -> bytes:
        """Return 32 bytes, then 82 for each other clinic."""
        return self.commitment + b"".join(self.boxes)

    @classmethod
    def from_bytes(cls, data: bytes, clinics: int) -> "Shares":
        """Read the shares of one of ``clinics`` clinics.

        Raises:
            AggregationRefused: it has another length.
        """
        _require_length(data, KEY_BYTES + (clinics - 1) * BOX_BYTES, "shares")
        return cls(data[:KEY_BYTES], _cut(data[KEY_BYTES:], BOX_BYTES))


@dataclass(frozen=True, slots=True)
class Inbox:
    """Who shared, and their shares for this clinic in the roster's order (``train.masked``)."""

    senders: frozenset[int]
    boxes: tuple[bytes, ...]

    def to_bytes(self, clinics: int) -> bytes:
        """Return the bitmap of senders, then 82 bytes for each but this clinic itself."""
        return bitmap(self.senders, clinics) + b"".join(self.boxes)

    @classmethod
    def from_bytes(cls, data: bytes, clinics: int) -> "Inbox":
        """Read an inbox.

        Raises:
            AggregationRefused: it has another length.
        """
        reader = _Reader(data, "shares")
        senders = reader.members(clinics)
        boxes = reader.take(max(0, len(senders) - 1) * BOX_BYTES)
        reader.end()
        return cls(senders, _cut(boxes, BOX_BYTES))


@dataclass(frozen=True, slots=True)
class Survivors:
    """Whose masked vectors are in the sum (``train.check``)."""

    members: frozenset[int]

    def to_bytes(self, clinics: int) -> bytes:
        """Return the bitmap."""
        return bitmap(self.members, clinics)

    @classmethod
    def from_bytes(cls, data: bytes, clinics: int) -> "Survivors":
        """Read the bitmap.

        Raises:
            AggregationRefused: it has another length.
        """
        reader = _Reader(data, "list of survivors")
        members = reader.members(clinics)
        reader.end()
        return cls(members)


def survivors_statement(session: Session, roster: Roster, members: Collection[int]) -> bytes:
    """Return what every survivor signs before any secret is opened."""
    listed = bitmap(members, len(roster.entries))
    return b"fedpeft survivors\x00" + session.digest + roster.digest + listed


@dataclass(frozen=True, slots=True)
class Unmasking:
    """Survivors, dropped clinics, and the survivors' signatures on the list (``train.unmask``)."""

    survivors: frozenset[int]
    dropped: frozenset[int]
    signatures: dict[int, bytes]

    def to_bytes(self, clinics: int) -> bytes:
        """Return three bitmaps and the signatures in order."""
        return (
            bitmap(self.survivors, clinics)
            + bitmap(self.dropped, clinics)
            + bitmap(self.signatures, clinics)
            + b"".join(self.signatures[signer] for signer in sorted(self.signatures))
        )

    @classmethod
    def from_bytes(cls, data: bytes, clinics: int) -> "Unmasking":
        """Read the request.

        Raises:
            AggregationRefused: it has another length.
        """
        reader = _Reader(data, "request to unmask")
        survivors, dropped = reader.members(clinics), reader.members(clinics)
        signers = sorted(reader.members(clinics))
        signatures = _cut(reader.take(len(signers) * SIGNATURE_BYTES), SIGNATURE_BYTES)
        reader.end()
        return cls(survivors, dropped, dict(zip(signers, signatures, strict=True)))


def bound_to(session: Session, roster: Roster) -> bytes:
    """Return the 32 bytes that every key between two clinics is derived for."""
    return hashlib.sha256(b"fedpeft roster\x00" + session.digest + roster.digest).digest()


def shares_to_bytes(shares: Sequence[bytes]) -> bytes:
    """Return the answer to ``train.unmask``: a share for each sender, in the roster's order."""
    return b"".join(shares)


def shares_from_bytes(data: bytes, count: int) -> tuple[bytes, ...]:
    """Read ``count`` shares.

    Raises:
        AggregationRefused: it has another length.
    """
    _require_length(data, count * SHARE_BYTES, "opened shares")
    return _cut(data, SHARE_BYTES)


def bitmap(members: Collection[int], clinics: int) -> bytes:
    """Return one bit a clinic, least significant first."""
    bits = sum(1 << member for member in members)
    return bits.to_bytes((clinics + 7) // 8, "little")


class _Reader:
    def __init__(self, data: bytes, what: str) -> None:
        self._data = data
        self._what = what
        self._at = 0

    def take(self, count: int) -> bytes:
        end = self._at + count
        if end > len(self._data):
            raise _unreadable(self._what)
        part, self._at = self._data[self._at : end], end
        return part

    def members(self, clinics: int) -> frozenset[int]:
        bits = int.from_bytes(self.take((clinics + 7) // 8), "little")
        if bits >> clinics:
            raise _unreadable(self._what)
        return frozenset(place for place in range(clinics) if bits >> place & 1)

    def end(self) -> None:
        if self._at != len(self._data):
            raise _unreadable(self._what)


def _cut(data: bytes, size: int) -> tuple[bytes, ...]:
    return tuple(data[at : at + size] for at in range(0, len(data), size))


def _require_length(data: bytes, expected: int, what: str) -> None:
    if len(data) != expected:
        raise _unreadable(what)


def _unreadable(what: str) -> AggregationRefused:
    return AggregationRefused(
        f"a {what} of the secure aggregation is not in the form of this release: it is not used; "
        "install the same fedpeft release everywhere"
    )
