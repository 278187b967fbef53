"""A clinic that has enrolled, as it stands in the enrolments' file, and how long its keys are good.

Must not know how clinics come and go.
"""

import datetime
import sqlite3
from dataclasses import dataclass
from typing import Final, Literal

from fedpeft.sealing.identity import PublicIdentity

KEY_DAYS: Final = 730
"""For how long a clinic's connection key is good; renewing it starts it anew."""
IDENTITY_DAYS: Final = 1095
"""For how long its identity is good, whatever happens to the connection key: three years, the
most that NIST SP 800-57 part 1 (revision 5, table 1) gives a private signature key."""
Carrier = Literal["network", "stick"]
"""How messages come to a clinic: over its connection, or in files that a person carries."""


@dataclass(frozen=True, kw_only=True)
class Clinic:
    """A clinic that has enrolled; ``node_id`` is None until the server has seen it.

    ``identity`` is None for a clinic that enrolled with a release before sealing:
    it must enrol again. ``seen`` is when it last proved its key, to a minute or so.
    """

    name: str
    public_key: str
    identity: PublicIdentity | None
    node_id: int | None
    enrolled: datetime.datetime
    keys_expire: datetime.datetime
    identity_expires: datetime.datetime
    carrier: Carrier = "network"
    seen: datetime.datetime | None = None

    @property
    def expires(self) -> datetime.datetime:
        """When its membership ends, unless it renews what ends first."""
        return min(self.keys_expire, self.identity_expires)

    def is_member(self, now: datetime.datetime) -> bool:
        """Say whether it may take part at ``now``: it has an identity, and keys that are good."""
        return self.identity is not None and now < self.expires


def enrolled_clinics(database: sqlite3.Connection) -> list[Clinic]:
    """Return all enrolled clinics, by name."""
    rows = database.execute(
        "SELECT name, public_key, identity, node_id, enrolled_at, "
        "coalesce(keys_at, enrolled_at), coalesce(identity_at, enrolled_at), carrier, "
        "seen_at FROM clinics ORDER BY name"
    ).fetchall()
    return [
        Clinic(
            name=name,
            public_key=public_key,
            identity=None if identity is None else PublicIdentity.from_text(identity),
            node_id=None if node_id is None else int(node_id),
            enrolled=moment_of(enrolled_at),
            keys_expire=moment_of(keys_at) + datetime.timedelta(days=KEY_DAYS),
            identity_expires=moment_of(identity_at) + datetime.timedelta(days=IDENTITY_DAYS),
            carrier="stick" if carrier == "stick" else "network",
            seen=None if seen_at is None else moment_of(seen_at),
        )
        for (
            name,
            public_key,
            identity,
            node_id,
            enrolled_at,
            keys_at,
            identity_at,
            carrier,
            seen_at,
        ) in rows
    ]


def moment_of(seconds: float) -> datetime.datetime:
    """Return a moment of the file, which counts seconds since 1970."""
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC)
