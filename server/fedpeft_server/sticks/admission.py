"""Admit a clinic that has no network: its request in, a signed ticket out."""

from pathlib import Path

from fedpeft.errors import ConfigError, StickRefused
from fedpeft.sealing.carried import read_carried
from fedpeft.sealing.join_file import JoinRequest, Ticket
from fedpeft.storage import require_folder, write_atomically
from fedpeft_server.enrolments.clinic import Carrier
from fedpeft_server.site.directory import Site


def admit_by_stick(site: Site, request: Path, ticket: Path) -> str:
    """Check the file ``request``, enrol its clinic, and write its ticket.

    The same request again gives the same ticket.

    Returns:
        The clinic's name.

    Raises:
        StickRefused: the file is no request, or of another federation.
        EnrolmentError: see ``Enrolments.admit``.
        KeyLocked: the site's identity cannot be unlocked; nothing was enrolled.
        StorageError: a file cannot be read or written.
    """
    require_folder(ticket.parent)
    asked = read_carried(request, JoinRequest.from_json)
    enrolments, server = site.enrolments(), site.identity
    if asked.federation != enrolments.federation:
        raise StickRefused(
            f"{request} is foreign: it is of federation {asked.federation!r}, and this is "
            f"{enrolments.federation}"
        )
    name = enrolments.admit(asked)
    (clinic,) = (each for each in enrolments.clinics() if each.name == name)
    granted = Ticket(
        federation=enrolments.federation,
        clinic=name,
        identity=asked.identity,
        keys_expire=clinic.keys_expire.isoformat(timespec="seconds"),
        identity_expires=clinic.identity_expires.isoformat(timespec="seconds"),
    )
    write_atomically(ticket, granted.to_json(server).encode(), mode=0o600)
    return name


def carrier_of(way: str) -> Carrier:
    """Read a way to reach clinics.

    Raises:
        ConfigError: it is none.
    """
    if way == "network" or way == "stick":
        return way
    raise ConfigError(f"{way!r} is no way to reach a clinic: write network or stick")
