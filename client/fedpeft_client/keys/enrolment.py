"""Join a federation: turn an invitation file into keys that the server knows, and know its own.

The private keys are made here and never leave the machine. Must not know the
connection that follows.
"""

import datetime
import json
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final

import httpx
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedpeft.errors import (
    ConnectionFailed,
    EnrolmentError,
    FedpeftError,
    SealingError,
    StorageError,
)
from fedpeft.sealing.identity import Identity, PublicIdentity
from fedpeft.sealing.keyfile import Protection, load_identity, save_identity
from fedpeft.sealing.possession import prove_possession
from fedpeft.sealing.public_file import public_line
from fedpeft.sealing.words import federation_words
from fedpeft.storage import write_once
from fedpeft_client.keys.key_life import Expiry, keep_expiry
from fedpeft_client.link.fleet import explain, load_key, not_a_server, open_http, url_of

KEY_FILE: Final = "key.pem"
CA_FILE: Final = "ca.pem"
IDENTITY_FILE: Final = "identity.key"
SERVER_IDENTITY_FILE: Final = "server.identity"

SCHEMA: Final = 2
_MAX_INVITATION_BYTES: Final = 64 << 10
_FIELDS: Final = (
    "server",
    "federation",
    "clinic",
    "base_model",
    "expires",
    "token",
    "identity",
    "ca",
)
_REFUSALS: Final = {
    "unknown": "the server does not know this invitation, or a newer one has replaced it: "
    "ask the central site for a new invitation",
    "expired": "the invitation has expired: ask the central site for a new one",
    "used": "the invitation was already used by another machine: if that was not you, tell the "
    "central site at once, and ask for a new invitation",
    "bad-key": "the server did not accept this machine's keys: "
    "join with an empty directory, so that new keys are made",
    "too-many-attempts": "the server has seen too many attempts from this network: "
    "wait a minute, and join again",
}


@dataclass(frozen=True, kw_only=True)
class Enrolment:
    """A membership: what the clinic's configuration must name.

    ``identity`` is this clinic's and ``server_identity`` the one that was pinned;
    ``fingerprint`` is the base model's.
    """

    server: str
    federation: str
    clinic: str
    fingerprint: str
    key: Path
    ca: Path
    identity: PublicIdentity
    server_identity: PublicIdentity


@dataclass(frozen=True, kw_only=True)
class Invitation:
    """What the central site wrote for this clinic; ``repr`` does not show the token."""

    server: str
    federation: str
    clinic: str
    fingerprint: str
    ca_pem: str
    identity: PublicIdentity
    token: str

    def words(self) -> str:
        """Return the federation's words, to be compared with the central site's by telephone.

        Raises:
            EnrolmentError: the CA certificate is damaged.
        """
        return federation_words(self.federation, self.ca_pem, self.identity)

    def __repr__(self) -> str:
        return f"Invitation(clinic={self.clinic!r})"


def join(invitation_file: Path, directory: Path, protection: Protection) -> Enrolment:
    """Enrol this machine with an invitation.

    Makes ``directory`` (mode 700) with ``key.pem`` and ``identity.key`` (mode 600) and,
    once the server has accepted, ``membership.json``, ``server.identity`` and ``ca.pem``. After a
    failure the keys stay and are used again by the next attempt, with the same or
    another invitation.

    Args:
        invitation_file: from the central site.
        directory: of the box.
        protection: how ``identity.key`` is encrypted, or was by an attempt before.

    Raises:
        EnrolmentError: the invitation is missing, unreadable, expired, used or
            unknown, or the directory is enrolled already.
        ConfigError: the invitation's server address is none.
        ConnectionFailed: the server cannot be reached.
        CertificateRefused: what answers is not the server of the invitation.
        StorageError: the directory cannot be written, or a key file is open to others.
        KeyLocked: an attempt before protected ``identity.key`` in another way.
        SealingError: ``identity.key`` is damaged.
    """
    invitation = read_invitation(invitation_file)
    key, identity = own_keys(invitation, directory, protection)
    settle(invitation, directory, _post(invitation, key, identity))
    return Enrolment(
        server=invitation.server,
        federation=invitation.federation,
        clinic=invitation.clinic,
        fingerprint=invitation.fingerprint,
        key=directory / KEY_FILE,
        ca=directory / CA_FILE,
        identity=identity.public,
        server_identity=invitation.identity,
    )


def own_keys(
    invitation: Invitation, directory: Path, protection: Protection
) -> tuple[ec.EllipticCurvePrivateKey, Identity]:
    """Return the keys of the box in ``directory``, made if this is the first attempt to join.

    Raises:
        EnrolmentError: the directory is enrolled already, or by another server's invitation.
        StorageError, KeyLocked, SealingError: see :func:`join`.
    """
    if (directory / CA_FILE).exists():
        raise EnrolmentError(
            f"{directory} is enrolled in a federation already: "
            "join with another, empty directory, or delete this one to leave its federation"
        )
    _require_same_server(directory / SERVER_IDENTITY_FILE, public_line(invitation.identity))
    key = _own_key(directory / KEY_FILE)
    return key, _own_identity(directory / IDENTITY_FILE, protection)


def settle(invitation: Invitation, directory: Path, expires: Expiry | None) -> None:
    """Write what a box that was accepted needs, its authority last: that says it is enrolled.

    Raises:
        StorageError: the directory cannot be written.
    """
    if expires is not None:
        keep_expiry(directory, expires)
    pin_path = directory / SERVER_IDENTITY_FILE
    try:
        if not pin_path.exists():
            write_once(pin_path, public_line(invitation.identity), mode=0o600)
        write_once(directory / CA_FILE, invitation.ca_pem.encode("ascii"), mode=0o600)
    except OSError as error:
        raise _cannot_write(directory, error) from error


def read_invitation(path: Path) -> Invitation:
    """Read an invitation file and check all of it that can be checked without the server.

    Raises:
        EnrolmentError: it is missing, damaged, of another schema, or expired.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_INVITATION_BYTES + 1)
    except OSError as error:
        raise EnrolmentError(
            f"the invitation {path} cannot be read ({error.strerror}): "
            "give the file that the central site sent you"
        ) from error
    try:
        document: Any = json.loads(content) if len(content) <= _MAX_INVITATION_BYTES else None
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise EnrolmentError(
            f"{path} is not an invitation (it is no JSON object): "
            "give the file that the central site sent you"
        )
    if document.get("schema") == 1:
        raise EnrolmentError(
            f"the invitation {path} was made by an older release, without the server's identity: "
            "ask the central site for a new one, made with the release that is installed here"
        )
    if document.get("schema") != SCHEMA:
        raise EnrolmentError(
            f"the invitation {path} has schema {document.get('schema')!r}, but this program knows "
            f"{SCHEMA} only: install the fedpeft version that the central site uses"
        )
    fields = {name: document.get(name) for name in _FIELDS}
    for name, value in fields.items():
        if not isinstance(value, str) or (not value.isprintable() and name != "ca"):
            raise EnrolmentError(
                f"the invitation {path} lacks a usable {name!r}: "
                "use an unchanged copy of the file that the central site sent you"
            )
    return _unexpired(path, fields)


def _unexpired(path: Path, fields: dict[str, Any]) -> Invitation:
    try:
        expires = datetime.datetime.fromisoformat(fields["expires"])
        expired = expires <= datetime.datetime.now(datetime.UTC)
        fields["ca"].encode("ascii")
        identity = PublicIdentity.from_text(fields["identity"])
    except (ValueError, TypeError, SealingError) as error:
        raise EnrolmentError(
            f"the invitation {path} is damaged: "
            "use an unchanged copy of the file that the central site sent you"
        ) from error
    if expired:
        raise EnrolmentError(
            f"the invitation {path} expired at {expires.isoformat()} by this machine's clock: "
            "ask the central site for a new one"
        )
    return Invitation(
        server=fields["server"],
        federation=fields["federation"],
        clinic=fields["clinic"],
        fingerprint=fields["base_model"],
        ca_pem=fields["ca"],
        identity=identity,
        token=fields["token"],
    )


def _own_key(path: Path) -> ec.EllipticCurvePrivateKey:
    return load_key(path) if path.exists() else new_key(path)


def new_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Make a connection key (P-384) in a new file of mode 600, and its folder of mode 700.

    Raises:
        StorageError: the folder cannot be written.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_once(path, pem, mode=0o600)
    except OSError as error:
        raise _cannot_write(path.parent, error) from error
    return key


def public_pem(key: ec.EllipticCurvePrivateKey) -> str:
    """Return the public half of a connection key, in PEM."""
    return (
        key.public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        .decode("ascii")
    )


def _own_identity(path: Path, protection: Protection) -> Identity:
    if path.exists():
        return load_identity(path, protection)
    identity = Identity.generate()
    save_identity(identity, path, protection)
    return identity


def _require_same_server(path: Path, pin: bytes) -> None:
    """Refuse an invitation of another server than an interrupted attempt was accepted by."""
    try:
        if path.read_bytes() == pin:
            return
    except FileNotFoundError:
        return
    except OSError as error:
        raise _cannot_write(path.parent, error) from error
    raise EnrolmentError(
        f"{path} holds the identity of another server than the invitation: "
        "ask the central site whether its identity was renewed, and join with an empty directory"
    )


def _post(
    invitation: Invitation, key: ec.EllipticCurvePrivateKey, identity: Identity
) -> Expiry | None:
    """Enrol, and return until when the keys are good; None: an older server does not say."""
    public_key = public_pem(key)
    document = {
        "token": invitation.token,
        "public_key": public_key,
        "identity": identity.public.to_text(),
        "proof": prove_possession(
            identity,
            federation=invitation.federation,
            token=invitation.token,
            public_key_pem=public_key,
        ),
    }
    with open_http(invitation.ca_pem) as http:
        try:
            response = http.post(f"{url_of(invitation.server)}/v1/enrol", json=document)
        except httpx.TransportError as error:
            raise explain(error, invitation.server) from error
    if response.status_code != HTTPStatus.OK:
        raise _refusal(invitation.server, response)
    try:
        return Expiry.told(response.json())
    except KeyError:
        return None
    except (ValueError, TypeError, AttributeError) as error:
        raise not_a_server(invitation.server) from error


def _refusal(server: str, response: httpx.Response) -> FedpeftError:
    try:
        document = response.json()
    except ValueError:
        document = None
    reason = document.get("reason") if isinstance(document, dict) else None
    if reason in _REFUSALS:
        return EnrolmentError(_REFUSALS[reason])
    if response.status_code >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return ConnectionFailed(
            f"the server {server} could not enrol this machine (HTTP {response.status_code}): "
            "try again, and if it goes on, tell the central site"
        )
    return not_a_server(server)


def _cannot_write(directory: Path, error: OSError) -> StorageError:
    return StorageError(
        f"{directory} cannot be written ({error.strerror}): "
        "check that it belongs to you and that the disk has space"
    )
