"""Renew the keys of a clinic that has no network: its request in, a signed confirmation out.

The statements are those that come over the network, and so are the rules.
"""

from pathlib import Path
from typing import Final

from fedpeft.errors import EnrolmentError, StickRefused
from fedpeft.protocol import KINDS
from fedpeft.sealing.carried import read_carried
from fedpeft.sealing.renewal_file import MOST_LINES, RenewalConfirmation, RenewalRequest
from fedpeft.sealing.succession import Succession
from fedpeft.secagg import STAGES
from fedpeft.storage import require_folder, write_atomically
from fedpeft_server.enrolments.rotation import renew_clinic
from fedpeft_server.site.directory import Site
from fedpeft_server.site.lock import server_runs
from fedpeft_server.sticks.drawer import Drawer
from fedpeft_server.sticks.post import FOLDER

_LAST_STEP: Final = f".{STAGES[-1]}"


def renew_by_stick(site: Site, request: Path, confirmation: Path) -> str:
    """Check the file ``request``, renew its clinic's keys, and write the confirmation.

    The same request again gives the same confirmation, until the keys are renewed once more.

    Returns:
        The clinic's name.

    Raises:
        StickRefused: the file is no request, of another federation, or comes while the clinic
            is asked something that it must answer under its old identity.
        EnrolmentError: it is not of the clinic's present keys.
        KeyLocked: the site's identity cannot be unlocked; nothing was renewed.
        StorageError: a file cannot be read or written.
    """
    require_folder(confirmation.parent)
    enrolments, server = site.enrolments(), site.identity
    asked, statements = _read(request, enrolments.federation)
    known = next((each for each in enrolments.clinics() if each.name == asked.clinic), None)
    if known is None:
        raise EnrolmentError(
            f"no clinic named {asked.clinic!r} is enrolled: fedpeft-server clinics lists the names"
        )
    passed_on = known.identity == statements[-1].new  # always so where the identity stays
    if not passed_on:
        _require_nothing_awaited(site.state, asked.clinic)
    if not passed_on or not asked.identity:
        renew_clinic(enrolments, asked.key)
    if asked.identity:
        renew_clinic(enrolments, asked.identity)
    (clinic,) = (each for each in enrolments.clinics() if each.name == asked.clinic)
    granted = RenewalConfirmation(
        federation=asked.federation,
        clinic=asked.clinic,
        request=asked.digest,
        keys_expire=clinic.keys_expire.isoformat(timespec="seconds"),
        identity_expires=clinic.identity_expires.isoformat(timespec="seconds"),
        succession="\n".join(site.sealing.succession[-MOST_LINES:]),
    )
    write_atomically(confirmation, granted.to_json(server).encode(), mode=0o600)
    return asked.clinic


def _read(request: Path, federation: str) -> tuple[RenewalRequest, tuple[Succession, ...]]:
    """Return what the file ``request`` asks of ``federation``, and its statements.

    Raises:
        StickRefused: it is no request, forged, or of another federation.
        StorageError: it cannot be read.
    """

    def parse(content: bytes) -> tuple[RenewalRequest, tuple[Succession, ...]]:
        found = RenewalRequest.from_json(content)
        return found, found.statements()

    asked, statements = read_carried(request, parse)
    if asked.federation != federation:
        raise StickRefused(
            f"{request} is foreign: it is of federation {asked.federation}, and this is "
            f"{federation}"
        )
    return asked, statements


def _require_nothing_awaited(state: Path, clinic: str) -> None:
    """Check that no answer of ``clinic`` is to come, or in a sum to go on, under its old identity.

    Raises:
        StickRefused: one is.
        StorageError: that cannot be read.
    """
    if not (state / FOLDER / clinic).is_dir():
        return
    with Drawer(state / FOLDER / clinic).locked() as drawer:
        last = drawer.asked[-1] if drawer.asked else None
    if last is None:
        return
    about = f"{clinic} is asked in round {last.place.round} ({last.place.purpose})"
    in_a_sum = last.place.purpose not in KINDS
    if in_a_sum and not server_runs(state):
        return  # it ended with its server
    if last.fate in ("open", "arrived"):
        raise StickRefused(
            f"the renewal comes too early: {about}, and answers that under its old identity; "
            "import the answer first, with the server running, and then run this again"
        )
    if in_a_sum and last.fate == "taken" and not last.place.purpose.endswith(_LAST_STEP):
        raise StickRefused(
            f"the renewal comes too early: {about}, a step of a secure sum, which it must end "
            f"under its old identity; run this again when its answer to the step {STAGES[-1]!r} "
            "was imported, or while the server is stopped"
        )
