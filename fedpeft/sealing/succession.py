"""How an identity passes its place to a new one: a statement that both have signed.

Whoever pinned the old identity may take the new one in its place without asking a person.
A stolen identity can be passed on by the thief too: after a theft nothing but joining anew
helps. Must not know files or the network.
"""

import binascii
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Self

from fedpeft.errors import SealingError
from fedpeft.sealing.identity import SIGNATURE_BYTES, Identity, PublicIdentity

SCHEMA: Final = 1
LONGEST_CHAIN: Final = 64
_DOMAIN: Final = b"fedpeft succession, version 1\x00"


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
        message = _message(self.federation, self.holder, self.old, self.new, self.key)
        for identity, signature in ((self.old, self.by_old), (self.new, self.by_new)):
            if len(signature) != SIGNATURE_BYTES:
                raise _not_a_succession()
            identity.verify(signature, message, source=f"the renewal of {self.holder}'s keys")

    @classmethod
    def sign(
        cls, old: Identity, new: Identity, *, federation: str, holder: str, key: str = ""
    ) -> Self:
        """Return the statement, signed by both; ``new`` may be ``old`` where only ``key`` is."""
        message = _message(federation, holder, old.public, new.public, key)
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


def _message(
    federation: str, holder: str, old: PublicIdentity, new: PublicIdentity, key: str
) -> bytes:
    parts = (federation.encode(), holder.encode(), old.data, new.data, key.encode())
    return _DOMAIN + b"".join(len(part).to_bytes(4, "little") + part for part in parts)


def _not_a_succession() -> SealingError:
    return SealingError(
        "what should be a renewal of keys is none of this release: "
        "install the same fedpeft release on both sides"
    )
