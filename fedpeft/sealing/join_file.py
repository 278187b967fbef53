"""How a box without a network joins: a request that goes to the central site, and its ticket.

The request proves what an enrolment over the network proves, but never holds the
invitation's token: whoever finds the stick cannot join with it. The ticket is signed by the
identity that the invitation pins. Specified in docs/spec/stick.md. Must not know files.
"""

import hashlib
import hmac
from dataclasses import asdict, dataclass
from typing import Final, Self

from fedpeft.errors import StickRefused, WrongSignature
from fedpeft.sealing.carried import fields_of, lengthened, not_ours, text_of
from fedpeft.sealing.identity import SIGNATURE_BYTES, Identity, PublicIdentity
from fedpeft.sealing.possession import prove_possession

_TOKEN_DOMAIN: Final = b"fedpeft token proof, version 1\x00"
_TICKET_DOMAIN: Final = b"fedpeft ticket, version 1\x00"


def token_key(secret: str) -> bytes:
    """Return the SHA-256 of the secret half of a token, which is all that the server keeps."""
    return hashlib.sha256(secret.encode()).digest()


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinRequest:
    """What a box shows to join; nothing of it is secret.

    ``token_id`` is the public half of the token, ``public_key`` the key of a connection
    (PEM), ``identity`` a public identity as text, ``possession`` the proof that the box holds
    it (hex), ``knowledge`` the proof that it knows the token (hex).
    """

    federation: str
    clinic: str
    token_id: str
    public_key: str
    identity: str
    possession: str
    knowledge: str

    @classmethod
    def make(
        cls, identity: Identity, *, federation: str, clinic: str, token: str, public_key: str
    ) -> Self:
        """Return the request of the holder of ``identity`` and ``token``."""
        token_id, _, secret = token.partition(".")
        text = identity.public.to_text()
        return cls(
            federation=federation,
            clinic=clinic,
            token_id=token_id,
            public_key=public_key,
            identity=text,
            possession=prove_possession(
                identity, federation=federation, token=token, public_key_pem=public_key
            ),
            knowledge=_knowledge(token_key(secret), federation, token_id, public_key, text).hex(),
        )

    def knows(self, key: bytes) -> bool:
        """Say whether it was made with the token of which ``key`` is the :func:`token_key`."""
        own = _knowledge(key, self.federation, self.token_id, self.public_key, self.identity)
        return hmac.compare_digest(own.hex(), self.knowledge)

    def to_json(self) -> str:
        """Return the text of the file."""
        return text_of("join-request", asdict(self))

    @classmethod
    def from_json(cls, content: bytes) -> Self:
        """Read what :meth:`to_json` wrote.

        Raises:
            StickRefused: it is none, or of another release.
        """
        try:
            return cls(**fields_of("join-request", content))
        except TypeError:
            raise not_ours() from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticket:
    """That a clinic was admitted, signed by the server.

    ``identity`` is the clinic's public identity as text; the others are ISO moments, until
    when its connection key and its identity are good.
    """

    federation: str
    clinic: str
    identity: str
    keys_expire: str
    identity_expires: str

    def to_json(self, server: Identity) -> str:
        """Return the text of the file, signed."""
        signature = server.sign(self._signed).hex()
        return text_of("ticket", {**asdict(self), "signature": signature})

    @classmethod
    def from_json(cls, content: bytes, server: PublicIdentity) -> Self:
        """Read what :meth:`to_json` wrote.

        Raises:
            StickRefused: it is none, of another release, or not signed by ``server``.
        """
        fields = fields_of("ticket", content)
        try:
            signature = bytes.fromhex(fields.pop("signature"))
            ticket = cls(**fields)
            if len(signature) != SIGNATURE_BYTES:
                raise ValueError
            server.verify(signature, ticket._signed, source="the central site")
        except (KeyError, TypeError, ValueError):
            raise not_ours() from None
        except WrongSignature:
            raise StickRefused(
                "was not signed by the central site of the invitation: nothing was joined; call "
                "the central site"
            ) from None
        return ticket

    @property
    def _signed(self) -> bytes:
        parts = (
            self.federation,
            self.clinic,
            self.identity,
            self.keys_expire,
            self.identity_expires,
        )
        return _TICKET_DOMAIN + lengthened(*(part.encode() for part in parts))


def _knowledge(key: bytes, *parts: str) -> bytes:
    message = _TOKEN_DOMAIN + lengthened(*(part.encode() for part in parts))
    return hmac.digest(key, message, "sha256")
