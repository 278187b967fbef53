"""Proof at enrolment that a clinic holds the identity it shows, and means this invitation.

The signature covers the federation, the invitation's id and both public keys of
the clinic, so it fits no other invitation and no other connection key.
"""

import binascii
from typing import Final

from fedpeft.errors import EnrolmentError, WrongSignature
from fedpeft.sealing.identity import SIGNATURE_BYTES, Identity, PublicIdentity

_DOMAIN: Final = b"fedpeft enrolment, version 1\x00"


def prove_possession(
    identity: Identity, *, federation: str, token: str, public_key_pem: str
) -> str:
    """Return the proof that goes with an enrolment, as hex.

    Args:
        identity: the clinic's own.
        federation: its name, from the invitation.
        token: of the invitation; only the half that is not secret is signed.
        public_key_pem: the connection key of the clinic, P-384, in PEM.
    """
    message = _message(identity.public, federation, token, public_key_pem)
    return identity.sign(message).hex()


def check_possession(
    proof: str, identity: PublicIdentity, *, federation: str, token: str, public_key_pem: str
) -> None:
    """Check what :func:`prove_possession` made.

    Raises:
        EnrolmentError: it is no proof of this identity for this federation, token and key.
    """
    message = _message(identity, federation, token, public_key_pem)
    try:
        signature = binascii.unhexlify(proof)
        if len(signature) != SIGNATURE_BYTES:
            raise ValueError
        identity.verify(signature, message, source="a clinic that enrols")
    except (ValueError, WrongSignature):
        raise EnrolmentError(
            "the clinic did not prove that it holds the identity it sent for this invitation: "
            "join again with this fedpeft version"
        ) from None


def _message(identity: PublicIdentity, federation: str, token: str, public_key_pem: str) -> bytes:
    token_id = token.partition(".")[0]
    parts = (federation.encode(), token_id.encode(), public_key_pem.encode(), identity.data)
    return _DOMAIN + b"".join(len(part).to_bytes(4, "little") + part for part in parts)
