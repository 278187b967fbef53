"""Renew this box's connection key or identity, and follow the server to a new one of its own.

All change a file of the box by one rename, so a running client reads the old one or the
new. Must not know rounds or records.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, cast

import httpx
from cryptography.hazmat.primitives.asymmetric import ec

from fedpeft.audit_log import AuditLog, note_handover
from fedpeft.errors import EnrolmentError, SealingError, SignerNotAllowed
from fedpeft.sealing.context import SERVER, clinic_role
from fedpeft.sealing.identity import Identity, PublicIdentity
from fedpeft.sealing.keyfile import Protection, load_identity, save_identity
from fedpeft.sealing.public_file import public_line
from fedpeft.sealing.succession import Succession, newest
from fedpeft.storage import explained, sync_directory, write_atomically
from fedpeft_client.box import Box
from fedpeft_client.folder_lock import locked
from fedpeft_client.keys.enrolment import SERVER_IDENTITY_FILE, new_key, public_pem
from fedpeft_client.keys.key_life import (
    Expiry,
    expiry_of,
    identity_in_progress,
    keep_expiry,
    renewal_in_progress,
)
from fedpeft_client.link.fleet import explain, load_key, not_a_server, open_http, read_ca, url_of
from fedpeft_client.vault import pass_on


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotated:
    """What was renewed: until when the keys are good, and the new identity, if there is one."""

    expiry: Expiry
    identity: PublicIdentity | None


def rotate_keys(box: Box, protection: Protection, *, identity: bool) -> Rotated:
    """Renew the connection key, and the identity if ``identity`` says so.

    An identity whose renewal broke off is renewed in any case, and only once.

    Args:
        box: whose keys.
        protection: of the identity, the old one and the new.
        identity: whether to renew that too.

    Raises:
        EnrolmentError: the server does not know this box's keys.
        ConnectionFailed, CertificateRefused: the server cannot be reached or trusted.
        StorageError, AuditLogDamaged: the box's directory or audit log cannot be written.
        KeyLocked, SealingError: the identity cannot be unlocked.
    """
    with locked(box.directory):
        present = load_identity(box.identity_path, protection)
        # The other way round the server might know a new identity, and the box sign with the
        # old one for its new connection key.
        finished = None
        if identity_in_progress(box.identity_path).exists():
            finished = present = renew_identity(box, present, protection)
        expiry = renew_key(box, present)
        if identity and finished is None:
            finished = renew_identity(box, present, protection)
            expiry = expiry_of(box.directory) or expiry
    return Rotated(expiry=expiry, identity=finished and finished.public)


def renew_key(box: Box, identity: Identity) -> Expiry:
    """Exchange the box's connection key for a new one, and return until when that is good.

    The new key is on the disk before the server hears of it, and takes the old one's place
    once it has answered: after a failure the same call goes on with the same key.

    Raises:
        EnrolmentError: the server does not know this box's keys.
        ConnectionFailed, CertificateRefused: the server cannot be reached or trusted.
        StorageError, AuditLogDamaged: the box's directory or audit log cannot be written.
    """
    waiting = renewal_in_progress(box.key)
    key = load_key(waiting) if waiting.exists() else new_key(waiting)
    statement = statement_of(box, identity, identity, key)
    AuditLog(box.audit).append("key", {"event": "renewing", "name": box.settings.clinic})
    expiry = _post(box, statement.to_json())
    keep_expiry(box.directory, expiry)
    take_key(box)
    return expiry


def take_key(box: Box) -> None:
    """Let the connection key that waits take the place of the present one; the server knows it.

    Raises:
        StorageError, AuditLogDamaged: the directory or the log cannot be written.
    """
    with explained("write", box.key):
        renewal_in_progress(box.key).replace(box.key)
        sync_directory(box.directory)
    AuditLog(box.audit).append("key", {"event": "renewed", "name": box.settings.clinic})


def renew_identity(box: Box, old: Identity, protection: Protection) -> Identity:
    """Put a new identity in the place of ``old``, which signs that; return it.

    The new one is on the disk before the server hears of it, and takes the place of the old
    file as the last step of all. After a failure the same call goes on with the same new one;
    until then a running client opens what is sealed for either.

    Raises:
        EnrolmentError, ConnectionFailed, CertificateRefused, StorageError, AuditLogDamaged:
            as :func:`renew_key`.
        KeyLocked, SealingError: the identity of an attempt before cannot be unlocked.
    """
    new = identity_to_come(box, old, protection)
    expiry = _post(box, statement_of(box, old, new, load_key(box.key)).to_json())
    keep_expiry(box.directory, expiry)
    take_identity(box, old.public, new)
    return new


def identity_to_come(box: Box, old: Identity, protection: Protection) -> Identity:
    """Return the identity that is to take the place of ``old``, made if none waits already.

    What is encrypted for ``old`` can be read with it, and that it was made is noted.

    Raises:
        StorageError, AuditLogDamaged: the directory or the log cannot be written.
        KeyLocked, SealingError: the one that waits cannot be unlocked.
    """
    waiting = identity_in_progress(box.identity_path)
    if not waiting.exists():
        save_identity(Identity.generate(), waiting, protection)
    new = load_identity(waiting, protection)
    pass_on(box.directory, old, new)
    about = {"before": old.public.fingerprint, "identity": new.public.fingerprint}
    AuditLog(box.audit).append("key", {"event": "renewing", "name": box.settings.clinic, **about})
    return new


def take_identity(box: Box, before: PublicIdentity, new: Identity) -> None:
    """Let ``new``, which waits, take the place of the identity ``before``; the server knows it.

    Raises:
        StorageError, AuditLogDamaged: the directory or the log cannot be written.
    """
    note_handover(box.audit, before, new, box.settings.clinic)
    with explained("write", box.identity_path):
        identity_in_progress(box.identity_path).replace(box.identity_path)
        sync_directory(box.directory)


def statement_of(
    box: Box, old: Identity, new: Identity, key: ec.EllipticCurvePrivateKey
) -> Succession:
    """Return the statement that ``key`` is the box's, and ``new`` its identity after ``old``."""
    return Succession.sign(
        old,
        new,
        federation=box.settings.server.federation,
        holder=clinic_role(box.settings.clinic),
        key=public_pem(key),
    )


def follow_server(box: Box) -> PublicIdentity | None:
    """Pin the identity that took the place of the pinned server's, if one did, and return it.

    Each step has to be signed by the identity before it, and the last one to be one of
    ``policy.signers`` where that is set.

    Raises:
        SignerNotAllowed: the clinic's people have to agree first.
        WrongSignature, SealingError: what the server shows is forged or damaged.
        ConnectionFailed, CertificateRefused, StorageError: as their names say.
    """
    server = box.settings.server.address
    document = _answer_of(box, lambda http: http.get(f"{url_of(server)}/v1/succession"))
    lines: Any = document.get("succession")
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise SealingError(
            f"the server {server} does not say how its identity came about: install the same "
            "fedpeft release on both sides"
        )
    return follow_lines(box, cast("list[str]", lines))


def follow_lines(box: Box, lines: Sequence[str]) -> PublicIdentity | None:
    """Pin the server identity to which its statements lead from the pinned one, and return it.

    Args:
        box: whose pinned identity it is.
        lines: the statements, the oldest first.

    Raises:
        SignerNotAllowed, WrongSignature, SealingError, StorageError: as :func:`follow_server`.
    """
    pinned = box.server_identity
    found = newest(lines, pinned, federation=box.settings.server.federation, holder=SERVER)
    if found == pinned:
        return None
    signers = box.settings.policy.signers
    if signers is not None and found.fingerprint not in signers:
        raise SignerNotAllowed(
            f"the server passed its office on to the identity {found.fingerprint}, which "
            "policy.signers in client.toml does not list: it is not followed; compare the "
            "fingerprint with the central site by telephone before you add it"
        )
    about = {"event": "server-renewed", "identity": found.fingerprint, "before": pinned.fingerprint}
    AuditLog(box.audit).append("key", about)
    write_atomically(box.directory / SERVER_IDENTITY_FILE, public_line(found), mode=0o600)
    return found


def _post(box: Box, statement: str) -> Expiry:
    url = f"{url_of(box.settings.server.address)}/v1/renew"
    document = _answer_of(box, lambda http: http.post(url, content=statement.encode()))
    try:
        return Expiry.told(document)
    except (KeyError, ValueError, TypeError) as error:
        raise not_a_server(box.settings.server.address) from error


def _answer_of(box: Box, ask: Callable[[httpx.Client], httpx.Response]) -> dict[str, Any]:
    server = box.settings.server.address
    with open_http(read_ca(box.ca)) as http:
        try:
            response = ask(http)
        except httpx.TransportError as error:
            raise explain(error, server) from error
    if response.status_code == HTTPStatus.FORBIDDEN:
        raise EnrolmentError(
            f"the server {server} does not know this box's keys as they are: it was removed or "
            "its keys expired, so ask for a new invitation and join in an empty directory"
        )
    if response.status_code == HTTPStatus.TOO_MANY_REQUESTS:
        raise EnrolmentError(
            f"the server {server} has seen too many attempts from this network: wait a minute, "
            "and try again"
        )
    try:
        document = json.loads(response.content)
    except ValueError as error:
        raise not_a_server(server) from error
    if response.status_code != HTTPStatus.OK or not isinstance(document, dict):
        raise not_a_server(server)
    return document
