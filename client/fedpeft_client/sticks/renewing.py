"""Renew the keys of a box without a network: a request goes out, a confirmation comes back.

The rules of docs/spec/succession.md hold as by network. The new keys are on the disk before
the request is, and take the old ones' places when the confirmation is here: a repeated command
goes on with the same ones. Until then the box answers under the old ones.
"""

from pathlib import Path
from typing import Final

from fedpeft.audit_log import AuditLog
from fedpeft.errors import EnrolmentError, SealingError, StickRefused, StorageError
from fedpeft.protocol.stick_file import StickFile
from fedpeft.sealing.carried import read_carried
from fedpeft.sealing.envelope import open_sealed
from fedpeft.sealing.keyfile import Protection, load_identity
from fedpeft.sealing.renewal_file import RenewalConfirmation, RenewalRequest
from fedpeft.sealing.succession import Succession
from fedpeft.storage import explained, require_folder, sync_directory, write_atomically
from fedpeft_client.box import Box
from fedpeft_client.folder_lock import locked
from fedpeft_client.keys.enrolment import new_key, public_pem
from fedpeft_client.keys.key_life import (
    Expiry,
    identity_in_progress,
    keep_expiry,
    renewal_in_progress,
)
from fedpeft_client.keys.renewal import (
    Rotated,
    follow_lines,
    identity_to_come,
    statement_of,
    take_identity,
    take_key,
)
from fedpeft_client.link.fleet import load_key
from fedpeft_client.sticks.granted import expiry_in

RENEWING_FILE: Final = "renewing.json"
"""The last request, until it is confirmed."""


def ask_to_renew(box: Box, protection: Protection, request: Path, *, identity: bool) -> None:
    """Make new keys for ``box``, and write the request for the central site.

    The same again, as after a lost stick, asks for the same keys; a new identity that was
    asked for once stays in the request.

    Raises:
        StorageError, AuditLogDamaged: the directory, its log or the request cannot be written.
        KeyLocked, SealingError: the identity cannot be unlocked.
    """
    require_folder(request.parent)
    with locked(box.directory):
        present = load_identity(box.identity_path, protection)
        waiting = renewal_in_progress(box.key)
        key = load_key(waiting) if waiting.exists() else new_key(waiting)
        log, name = AuditLog(box.audit), box.settings.clinic
        log.append("key", {"event": "renewing", "name": name})
        passed_on = ""
        if identity or identity_in_progress(box.identity_path).exists():
            new = identity_to_come(box, present, protection)
            passed_on = statement_of(box, present, new, key).to_json()
        asked = RenewalRequest(
            federation=box.settings.server.federation,
            clinic=name,
            key=statement_of(box, present, present, key).to_json(),
            identity=passed_on,
        )
        content = asked.to_json().encode()
        write_atomically(box.directory / RENEWING_FILE, content, mode=0o600)
        write_atomically(request, content, mode=0o600)


def is_renewing(directory: Path) -> bool:
    """Say whether the box in ``directory`` awaits a confirmation."""
    return (directory / RENEWING_FILE).is_file()


def take_confirmation(box: Box, protection: Protection, confirmation: Path) -> Rotated:
    """Put the new keys of ``box`` in the places of the old ones, as the central site has.

    After a failure the same call goes on.

    Raises:
        StickRefused: the confirmation is of another box or request, damaged or forged.
        SignerNotAllowed: the server has a new identity, and the clinic's people have to agree.
        EnrolmentError: this box did not ask to renew anything.
        StorageError, AuditLogDamaged: a file cannot be read or written.
        KeyLocked, SealingError: an identity cannot be unlocked.
    """
    with locked(box.directory):
        asked = _pending(box)
        found, expiry = _confirmed(box, confirmation, asked)
        follow_lines(box, found.lines)
        keep_expiry(box.directory, expiry)
        key, *others = asked.statements()
        waiting = renewal_in_progress(box.key)
        if waiting.exists() and public_pem(load_key(waiting)) == key.key:
            take_key(box)
        identity = None
        for statement in others:
            _take_identity(box, statement, protection)
            identity = statement.new
        path = box.directory / RENEWING_FILE
        with explained("remove", path):
            path.unlink()
            sync_directory(box.directory)
    return Rotated(expiry=expiry, identity=identity)


def require_confirmed(box: Box, question: StickFile, protection: Protection) -> None:
    """Check that ``question`` is not sealed for an identity that this box does not use yet.

    Raises:
        StickRefused: it is; nothing was answered.
        KeyLocked, SealingError, StorageError: the identity to come cannot be read.
    """
    waiting = identity_in_progress(box.identity_path)
    if not waiting.exists():
        return
    try:
        open_sealed(
            question.sealed,
            question.context,
            sender=box.server_identity,
            receiver=load_identity(waiting, protection),
            max_bytes=len(question.sealed),
        )
    except SealingError:
        return
    raise StickRefused(
        "is for the new identity of this box, which the central site knows already: first take "
        f"in its confirmation, fedpeft-client ticket FILE {box.directory}"
    )


def _pending(box: Box) -> RenewalRequest:
    path = box.directory / RENEWING_FILE
    if not path.is_file():
        raise EnrolmentError(
            f"{box.directory} has not asked to renew its keys by stick: run fedpeft-client rotate "
            "--stick REQUEST first, and name its directory here"
        )
    with explained("read", path):
        content = path.read_bytes()
    try:
        asked = RenewalRequest.from_json(content)
        asked.statements()
    except StickRefused:
        raise StorageError(
            f"{path} is damaged or of another release: run fedpeft-client rotate --stick REQUEST "
            "again, and bring that request to the central site"
        ) from None
    return asked


def _confirmed(box: Box, file: Path, asked: RenewalRequest) -> tuple[RenewalConfirmation, Expiry]:
    """Return what ``file`` confirms, if that is just what was asked for."""
    server = box.server_identity
    found = read_carried(file, lambda content: RenewalConfirmation.from_json(content, server))
    expiry = expiry_in(found, file)
    if (found.federation, found.clinic) != (asked.federation, asked.clinic):
        raise StickRefused(
            f"{file} is foreign: it is for clinic {found.clinic} of {found.federation}, and this "
            f"box is {asked.clinic} of {asked.federation}"
        )
    if found.request != asked.digest:
        raise StickRefused(
            f"{file} confirms another request than the last one of this box: bring that one to "
            f"the central site; it is kept in {box.directory / RENEWING_FILE}"
        )
    return found, expiry


def _take_identity(box: Box, statement: Succession, protection: Protection) -> None:
    waiting = identity_in_progress(box.identity_path)
    if not waiting.exists():
        return  # taken before an interruption
    new = load_identity(waiting, protection)
    if new.public == statement.new:
        take_identity(box, statement.old, new)
