"""The keys that a clinic shows when it enrols or renews them, in the form that is compared."""

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedpeft.errors import EnrolmentError, SealingError
from fedpeft.sealing.identity import PublicIdentity


def canonical_public_key(pem: str) -> str:
    """Return a P-384 public key in the one PEM form by which keys are compared.

    Raises:
        EnrolmentError: it is not an EC P-384 public key in PEM.
    """
    try:
        key = serialization.load_pem_public_key(pem.encode())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise EnrolmentError(
            "what was sent is not a public key in PEM form: join again with this fedpeft version"
        ) from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise EnrolmentError(
            "the public key is not on the curve P-384: join again with this fedpeft version"
        )
    return key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    ).decode("ascii")


def shown_identity(text: str) -> PublicIdentity:
    """Return the public identity that was sent.

    Raises:
        EnrolmentError: it is none.
    """
    try:
        return PublicIdentity.from_text(text)
    except SealingError as error:
        raise EnrolmentError(
            "what was sent is not a public identity: join again with this fedpeft version"
        ) from error
