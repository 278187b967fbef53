"""What one secure sum is about; every key and signature of it is bound to this."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Final

HINT_BYTES: Final = 8
_DOMAIN: Final = b"fedpeft secure aggregation, version 1\x00"


@dataclass(frozen=True, kw_only=True)
class Session:
    """One attempt at one sum.

    ``run`` is Flower's run id, ``kind`` is train or evaluate, ``model`` the SHA-256
    of the job and adapter that the server sent: clinics that were sent different
    ones derive different masks, whose sum stays noise (Pasquini et al. 2022,
    arXiv:2111.07380).
    """

    federation: str
    run: int
    round: int
    attempt: int
    kind: str
    model: bytes

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 over all fields, each with its length, 32 bytes."""
        fields = (
            self.federation.encode(),
            self.run.to_bytes(8),
            self.round.to_bytes(4),
            self.attempt.to_bytes(4),
            self.kind.encode(),
            self.model,
        )
        content = b"".join(len(field).to_bytes(4) + field for field in fields)
        return hashlib.sha256(_DOMAIN + content).digest()

    @property
    def hint(self) -> bytes:
        """The first 8 bytes of the digest: enough to tell sessions apart in an error."""
        return self.digest[:HINT_BYTES]
