"""What a clinic's session must remember from one request to the next, as bytes.

Secret: it opens the clinic's masks. Whoever keeps it encrypts it, and removes it when the
session ends. Must not know files, nor what the session does with it.
"""

import json
import secrets
from dataclasses import dataclass, field
from typing import Any, Final

from fedpeft.errors import AggregationRefused
from fedpeft.sealing.identity import KEY_BYTES
from fedpeft.secagg.messages import Advert, Roster
from fedpeft.secagg.pairwise import EphemeralKey

SCHEMA: Final = 1


@dataclass
class Secrets:
    """What a session must forget when it ends.

    ``shares`` are by place: the share of that clinic's mask key, and of its self-mask seed.
    """

    share_key: EphemeralKey = field(default_factory=EphemeralKey.generate, repr=False)
    mask_key: EphemeralKey = field(default_factory=EphemeralKey.generate, repr=False)
    self_seed: bytes = field(default_factory=lambda: secrets.token_bytes(KEY_BYTES), repr=False)
    advert: Advert | None = None
    bound: bytes = field(default=b"", repr=False)
    shares: dict[int, tuple[bytes, bytes]] = field(
        default_factory=dict[int, tuple[bytes, bytes]], repr=False
    )


@dataclass(frozen=True, kw_only=True)
class KeptSession:
    """A session between two requests; ``state`` is the name of how far it has come."""

    state: str
    secrets: Secrets = field(repr=False)
    roster: Roster | None
    senders: frozenset[int]
    survivors: frozenset[int]

    def to_bytes(self) -> bytes:
        """Return all of it; secret."""
        kept = self.secrets
        shares = {str(place): [one.hex() for one in pair] for place, pair in kept.shares.items()}
        document = {
            "schema": SCHEMA,
            "state": self.state,
            "share_key": kept.share_key.private.hex(),
            "mask_key": kept.mask_key.private.hex(),
            "self_seed": kept.self_seed.hex(),
            "advert": kept.advert.to_bytes().hex() if kept.advert else "",
            "bound": kept.bound.hex(),
            "shares": shares,
            "roster": self.roster.to_bytes().hex() if self.roster else "",
            "senders": sorted(self.senders),
            "survivors": sorted(self.survivors),
        }
        return json.dumps(document).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> "KeptSession":
        """Read what :meth:`to_bytes` wrote.

        Raises:
            AggregationRefused: it is of another release.
        """
        try:
            document: Any = json.loads(data)
            if document["schema"] != SCHEMA:
                raise ValueError
            advert, roster = (bytes.fromhex(document[name]) for name in ("advert", "roster"))
            kept = Secrets(
                share_key=EphemeralKey(bytes.fromhex(document["share_key"])),
                mask_key=EphemeralKey(bytes.fromhex(document["mask_key"])),
                self_seed=bytes.fromhex(document["self_seed"]),
                advert=Advert.from_bytes(advert) if advert else None,
                bound=bytes.fromhex(document["bound"]),
                shares={
                    int(place): (bytes.fromhex(key), bytes.fromhex(seed))
                    for place, (key, seed) in document["shares"].items()
                },
            )
            return cls(
                state=document["state"],
                secrets=kept,
                roster=Roster.from_bytes(roster) if roster else None,
                senders=frozenset(document["senders"]),
                survivors=frozenset(document["survivors"]),
            )
        except (ValueError, KeyError, TypeError, AttributeError):
            raise AggregationRefused(
                "the secure sum that was begun here is kept in a form that this release does not "
                "read: it is left, and the server asks anew"
            ) from None
