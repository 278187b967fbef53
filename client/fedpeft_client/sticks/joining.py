"""Join a federation without a network: a request goes out on a stick, a ticket comes back.

Until the ticket is here, the directory holds keys and ``joining.json``, and takes no part.
"""

import json
from pathlib import Path
from typing import Any, Final

from fedpeft.errors import EnrolmentError, SealingError, StickRefused, StorageError
from fedpeft.sealing.carried import read_carried
from fedpeft.sealing.identity import PublicIdentity
from fedpeft.sealing.join_file import JoinRequest, Ticket
from fedpeft.sealing.keyfile import Protection
from fedpeft.storage import explained, sync_directory, write_atomically
from fedpeft_client.keys.enrolment import CA_FILE, Invitation, own_keys, public_pem, settle
from fedpeft_client.settings import CONFIG_FILE
from fedpeft_client.sticks.granted import expiry_in

SCHEMA: Final = 1
JOINING_FILE: Final = "joining.json"


def ask_to_join(
    invitation: Invitation, directory: Path, protection: Protection, settings: str, request: Path
) -> PublicIdentity:
    """Make the box's keys in ``directory`` and write its request; return its identity.

    ``settings`` is the text of ``client.toml``, which is written when the ticket comes. The
    same again, as after a lost stick, gives a request of the same keys.

    Raises:
        EnrolmentError, StorageError, KeyLocked, SealingError: see ``enrolment.join``.
    """
    key, identity = own_keys(invitation, directory, protection)
    asked = JoinRequest.make(
        identity,
        federation=invitation.federation,
        clinic=invitation.clinic,
        token=invitation.token,
        public_key=public_pem(key),
    )
    own = identity.public
    write_atomically(
        directory / JOINING_FILE, _joining(invitation, own, settings).encode(), mode=0o600
    )
    write_atomically(request, asked.to_json().encode(), mode=0o600)
    return own


def take_ticket(ticket: Path, directory: Path) -> Invitation:
    """Complete the join of the box in ``directory``.

    Returns:
        What the box was invited to; its token is gone.

    Raises:
        StickRefused: the ticket is of another box or federation, damaged or forged.
        EnrolmentError: this directory did not ask to join.
        StorageError: a file cannot be read or written.
    """
    invitation, own, settings = _pending(directory)
    granted = read_carried(ticket, lambda content: Ticket.from_json(content, invitation.identity))
    expiry = expiry_in(granted, ticket)
    mine = (invitation.federation, invitation.clinic, own)
    if (granted.federation, granted.clinic, granted.identity) != mine:
        raise StickRefused(
            f"{ticket} is foreign: it admits clinic {granted.clinic} of {granted.federation}, or a "
            f"box with other keys, and this one asked to join {invitation.federation} as "
            f"{invitation.clinic}"
        )
    write_atomically(directory / CONFIG_FILE, settings.encode())
    settle(invitation, directory, expiry)
    path = directory / JOINING_FILE
    with explained("remove", path):
        path.unlink()
        sync_directory(directory)
    return invitation


def is_joining(directory: Path) -> bool:
    """Say whether the box in ``directory`` has asked to join, and awaits its ticket."""
    # The authority comes last, by stick or by network.
    return (directory / JOINING_FILE).is_file() and not (directory / CA_FILE).is_file()


def require_asked(directory: Path) -> None:
    """Check that the box in ``directory`` awaits its ticket.

    Raises:
        EnrolmentError: it has joined already, or never asked to.
    """
    if is_joining(directory):
        return
    if (directory / CONFIG_FILE).is_file():
        raise EnrolmentError(
            f"{directory} has joined already and awaits no ticket: nothing is to be done, unless "
            "you meant another directory"
        )
    raise EnrolmentError(
        f"{directory} has not asked to join by stick: run fedpeft-client join INVITATION "
        "--stick REQUEST first, and name its directory here"
    )


def _joining(invitation: Invitation, own: PublicIdentity, settings: str) -> str:
    document = {
        "schema": SCHEMA,
        "server": invitation.server,
        "federation": invitation.federation,
        "clinic": invitation.clinic,
        "base_model": invitation.fingerprint,
        "identity": invitation.identity.to_text(),
        "ca": invitation.ca_pem,
        "own": own.to_text(),
        "settings": settings,
    }
    return json.dumps(document, indent=2) + "\n"


def _pending(directory: Path) -> tuple[Invitation, str, str]:
    """Return the invitation without its token, the box's identity, and its settings."""
    require_asked(directory)
    path = directory / JOINING_FILE
    with explained("read", path):
        content = path.read_bytes()
    try:
        document: Any = json.loads(content)
        if document["schema"] != SCHEMA:
            raise ValueError
        invitation = Invitation(
            server=document["server"],
            federation=document["federation"],
            clinic=document["clinic"],
            fingerprint=document["base_model"],
            ca_pem=document["ca"],
            identity=PublicIdentity.from_text(document["identity"]),
            token="",
        )
        return invitation, document["own"], document["settings"]
    except (ValueError, KeyError, TypeError, SealingError):
        raise StorageError(
            f"{path} is damaged or of another release: join again with the invitation, in the same "
            "directory"
        ) from None
