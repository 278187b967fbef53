"""How an identity passes its place to a new one: a statement that both have signed.

Whoever pinned the old identity may take the new one in its place without asking a person.
Other clinics know of a clinic its signing key alone; for them a statement has a short form,
the :class:`Link`. A stolen identity can be passed on by the thief too: after a theft nothing
but joining anew helps. Must not know files or the network. Specified in
docs/spec/succession.md.
"""

import binascii
import hashlib
import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Self

from fedpeft.errors import SealingError
from fedpeft.sealing.identity import (
    KEY_BYTES,
    SIGNATURE_BYTES,
    Identity,
    PublicIdentity,
    verify,
)

SCHEMA: Final = 2
LONGEST_CHAIN: Final = 64
MOST_LINKS: Final = 8
"""Of one clinic that others are handed: who slept through more compares by telephone."""
_DOMAIN: Final = b"fedpeft succession, version 2\x00"
_DIGEST_BYTES: Final = 32
_LINK: Final = struct.Struct(
    f"<{KEY_BYTES}s{_DIGEST_BYTES}s{KEY_BYTES}s{_DIGEST_BYTES}s{_DIGEST_BYTES}s"
    f"{SIGNATURE_BYTES}s{SIGNATURE_BYTES}s"
)
LINK_BYTES: Final = _LINK.size


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A statement as those need it who know signing keys alone (Ed25519, 32 bytes each).

    ``old_digest`` and ``new_digest`` are the SHA-256 of the whole identities,
    ``key_digest`` that of the connection key's PEM. Not checked before :meth:`verify`.
    """

    old: bytes
    old_digest: bytes
    new: bytes
    new_digest: bytes
    key_digest: bytes
    by_old: bytes
    by_new: bytes

    def verify(self, *, federation: str, holder: str) -> None:
        """Check that old and new key have signed this for ``holder`` in ``federation``.

        Raises:
            WrongSignature: one of them has not.
        """
        message = self.message(federation, holder)
        for key, signature in ((self.old, self.by_old), (self.new, self.by_new)):
            verify(key, signature, message, source=f"the renewal of {holder}'s keys")

    def message(self, federation: str, holder: str) -> bytes:
        """Return what both sign."""
        parts = (federation.encode(), holder.encode())
        framed = b"".join(len(part).to_bytes(4, "little") + part for part in parts)
        keys = self.old + self.old_digest + self.new + self.new_digest + self.key_digest
        return _DOMAIN + framed + keys

    def to_bytes(self) -> bytes:
        """Return ``LINK_BYTES`` bytes, without federation and holder, which a reader knows."""
        return _LINK.pack(
            self.old,
            self.old_digest,
            self.new,
            self.new_digest,
            self.key_digest,
            self.by_old,
            self.by_new,
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read what :meth:`to_bytes` wrote.

        Raises:
            SealingError: it has another length.
        """
        if len(data) != LINK_BYTES:
            raise _not_a_succession()
        old, old_digest, new, new_digest, key_digest, by_old, by_new = _LINK.unpack(data)
        return cls(
            old=old,
            old_digest=old_digest,
            new=new,
            new_digest=new_digest,
            key_digest=key_digest,
            by_old=by_old,
            by_new=by_new,
        )


@dataclass(frozen=True, kw_only=True)
class Succession:
    """``old`` passes the role ``holder`` (see context.py) in ``federation`` to ``new``.

    ``key`` is the new connection key of a clinic (PEM), which goes with it; a server has none.
    ``by_old`` and ``by_new`` are signatures over all of it.

    Raises:
        WrongSignature: one of the signatures is false.
        SealingError: one of them is none.
    """

    federation: str
    holder: str
    old: PublicIdentity
    new: PublicIdentity
    key: str
    by_old: bytes
    by_new: bytes

    def __post_init__(self) -> None:
        if {len(self.by_old), len(self.by_new)} != {SIGNATURE_BYTES}:
            raise _not_a_succession()
        self.link.verify(federation=self.federation, holder=self.holder)

    @property
    def link(self) -> Link:
        """The short form of this statement, under the same signatures."""
        return _link(self.old, self.new, self.key, self.by_old, self.by_new)

    @classmethod
    def sign(
        cls, old: Identity, new: Identity, *, federation: str, holder: str, key: str = ""
    ) -> Self:
        """Return the statement, signed by both; ``new`` may be ``old`` where only ``key`` is."""
        unsigned = _link(old.public, new.public, key, b"", b"")
        message = unsigned.message(federation, holder)
        return cls(
            federation=federation,
            holder=holder,
            old=old.public,
            new=new.public,
            key=key,
            by_old=old.sign(message),
            by_new=new.sign(message),
        )

    def to_json(self) -> str:
        """Return the statement as one line of JSON."""
        return json.dumps(
            {
                "schema": SCHEMA,
                "federation": self.federation,
                "holder": self.holder,
                "old": self.old.to_text(),
                "new": self.new.to_text(),
                "key": self.key,
                "by_old": self.by_old.hex(),
                "by_new": self.by_new.hex(),
            }
        )

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Read a statement and check its signatures.

        Raises:
            WrongSignature: one of the signatures is false.
            SealingError: it is no statement of this release.
        """
        try:
            fields: Any = json.loads(text)
            if fields.pop("schema") != SCHEMA:
                raise ValueError
            texts = {name: value for name, value in fields.items() if isinstance(value, str)}
            return cls(
                federation=texts["federation"],
                holder=texts["holder"],
                old=PublicIdentity.from_text(texts["old"]),
                new=PublicIdentity.from_text(texts["new"]),
                key=texts["key"],
                by_old=binascii.unhexlify(texts["by_old"]),
                by_new=binascii.unhexlify(texts["by_new"]),
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise _not_a_succession() from None


def newest(
    lines: Sequence[str | bytes], pinned: PublicIdentity, *, federation: str, holder: str
) -> PublicIdentity:
    """Follow statements, the oldest first, from ``pinned`` to the identity in its place now.

    Statements before ``pinned`` are passed over, and so are others that do not begin with
    the identity that was reached.

    Raises:
        WrongSignature: a statement on the way is forged.
        SealingError: a line is no statement, or there are too many.
    """
    if len(lines) > LONGEST_CHAIN:
        raise _not_a_succession()
    for line in lines:
        step = Succession.from_json(line)
        if (step.federation, step.holder, step.old) == (federation, holder, pinned):
            pinned = step.new
    return pinned


def newest_key(links: Sequence[bytes], pinned: bytes, *, federation: str, holder: str) -> bytes:
    """Follow links, the oldest first, from the signing key ``pinned`` to the one there now.

    As :func:`newest`, for those who know signing keys alone.

    Raises:
        WrongSignature: a link on the way is forged, or is of another federation or holder.
        SealingError: one is no link, or there are more than ``MOST_LINKS``.
    """
    if len(links) > MOST_LINKS:
        raise _not_a_succession()
    for data in links:
        link = Link.from_bytes(data)
        if link.old == pinned:
            link.verify(federation=federation, holder=holder)
            pinned = link.new
    return pinned


def _link(old: PublicIdentity, new: PublicIdentity, key: str, by_old: bytes, by_new: bytes) -> Link:
    return Link(
        old=old.signing_bytes,
        old_digest=old.digest,
        new=new.signing_bytes,
        new_digest=new.digest,
        key_digest=hashlib.sha256(key.encode()).digest(),
        by_old=by_old,
        by_new=by_new,
    )


def _not_a_succession() -> SealingError:
    return SealingError(
        "what should be a renewal of keys is none of this release: "
        "install the same fedpeft release on both sides"
    )
