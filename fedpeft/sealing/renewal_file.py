"""How a box without a network renews its keys: a request that goes out, and its confirmation.

The request holds the very statements that would go over the network (docs/spec/succession.md);
nothing of it is secret. The confirmation says that the central site follows them, and how
that came to its own identity. Specified in docs/spec/stick.md. Must not know files.
"""

import hashlib
from dataclasses import asdict, dataclass
from typing import Final, Self

from fedpeft.errors import SealingError, StickRefused, WrongSignature
from fedpeft.sealing.carried import fields_of, lengthened, not_ours, text_of
from fedpeft.sealing.context import SERVER, clinic_role
from fedpeft.sealing.identity import SIGNATURE_BYTES, Identity, PublicIdentity
from fedpeft.sealing.succession import Succession, newest

REQUEST_KIND: Final = "renewal-request"
MOST_LINES: Final = 8
"""Statements of the server that a confirmation has room for: the newest ones."""
_DOMAIN: Final = b"fedpeft renewal, version 1\x00"


@dataclass(frozen=True, slots=True, kw_only=True)
class RenewalRequest:
    """What a box asks to be known by from now on.

    ``key`` is the statement with a new connection key, under the present identity;
    ``identity`` the one that passes on to a new identity, with that key; empty: it stays.
    """

    federation: str
    clinic: str
    key: str
    identity: str

    def statements(self) -> tuple[Succession, ...]:
        """Return the statements, of which all signatures are good, in their order.

        Raises:
            StickRefused: they are none, or not of this clinic, or do not belong together.
        """
        try:
            found = tuple(Succession.from_json(text) for text in (self.key, self.identity) if text)
        except SealingError:
            raise not_ours() from None
        about = {(each.federation, each.holder, each.key) for each in found}
        expected = {(self.federation, clinic_role(self.clinic), found[0].key)} if found else set()
        ranks = [each.old == each.new for each in found]
        if about != expected or ranks not in ([True], [True, False]):
            raise not_ours()
        if found[-1].old != found[0].new:
            raise not_ours()
        return found

    @property
    def digest(self) -> str:
        """The SHA-256 of what is asked, in hex: what a confirmation is about."""
        parts = (self.federation, self.clinic, self.key, self.identity)
        return hashlib.sha256(lengthened(*(part.encode() for part in parts))).hexdigest()

    def to_json(self) -> str:
        """Return the text of the file."""
        return text_of(REQUEST_KIND, asdict(self))

    @classmethod
    def from_json(cls, content: bytes) -> Self:
        """Read what :meth:`to_json` wrote.

        Raises:
            StickRefused: it is none, or of another release.
        """
        try:
            return cls(**fields_of(REQUEST_KIND, content))
        except TypeError:
            raise not_ours() from None


@dataclass(frozen=True, slots=True, kw_only=True)
class RenewalConfirmation:
    """That the central site knows a clinic by the keys of a request, signed by the server.

    ``request`` is the request's digest. The moments are ISO, until when connection key and
    identity are good. ``succession`` are statements of the server, one a line, the oldest
    first, by which a box follows to the identity that signed this.
    """

    federation: str
    clinic: str
    request: str
    keys_expire: str
    identity_expires: str
    succession: str

    def to_json(self, server: Identity) -> str:
        """Return the text of the file, signed."""
        signature = server.sign(self._signed).hex()
        return text_of("renewal-confirmation", {**asdict(self), "signature": signature})

    @classmethod
    def from_json(cls, content: bytes, pinned: PublicIdentity) -> Self:
        """Read what :meth:`to_json` wrote, for a box that has ``pinned`` a server's identity.

        Raises:
            StickRefused: it is none, of another release, or not signed by the pinned server,
                nor by the one that took its place.
        """
        fields = fields_of("renewal-confirmation", content)
        try:
            signature = bytes.fromhex(fields.pop("signature"))
            found = cls(**fields)
            if len(signature) != SIGNATURE_BYTES:
                raise ValueError
            found.signer(pinned).verify(signature, found._signed, source="the central site")
        except WrongSignature:
            raise StickRefused(
                "was not signed by the central site that this box joined: the keys stay as they "
                "are; call the central site"
            ) from None
        except (KeyError, TypeError, ValueError, SealingError):
            raise not_ours() from None
        return found

    @property
    def lines(self) -> list[str]:
        """The statements of the server."""
        return self.succession.splitlines()

    def signer(self, pinned: PublicIdentity) -> PublicIdentity:
        """Return the identity to which the statements lead from the ``pinned`` one.

        Raises:
            WrongSignature, SealingError: one of them is forged, or none.
        """
        return newest(self.lines, pinned, federation=self.federation, holder=SERVER)

    @property
    def _signed(self) -> bytes:
        parts = (
            self.federation,
            self.clinic,
            self.request,
            self.keys_expire,
            self.identity_expires,
            self.succession,
        )
        return _DOMAIN + lengthened(*(part.encode() for part in parts))
