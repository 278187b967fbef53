"""Everybody who may take part, might, or no longer may: what ``fedpeft-server clinics`` lists."""

import datetime
from dataclasses import dataclass
from typing import Literal

from fedpeft_server.enrolments.clinic import Clinic
from fedpeft_server.enrolments.enrolment import Enrolments

WARNING_DAYS = 30
"""So long before keys or certificates expire, everybody who looks is warned."""

State = Literal[
    "enrolled",
    "enrolled, by stick",
    "must enrol again",
    "keys expired",
    "invited",
    "lapsed",
    "revoked",
]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A name with what it stands for.

    ``since`` is when it was enrolled, or revoked; ``expires`` when keys or invitation do.
    """

    name: str
    state: State
    since: datetime.datetime | None = None
    seen: datetime.datetime | None = None
    expires: datetime.datetime | None = None
    fingerprint: str = ""

    def line(self) -> str:
        """Return the entry as a line of six columns, separated by tabs."""
        moments = [_text(moment) for moment in (self.since, self.seen, self.expires)]
        return "\t".join((self.name, self.state, *moments, self.fingerprint or "-"))


def roster(enrolments: Enrolments) -> list[Entry]:
    """Return the clinics, then open and lapsed invitations, then what was revoked."""
    now = datetime.datetime.now(datetime.UTC)
    clinics = [_entry(clinic, now) for clinic in enrolments.clinics()]
    invited = [
        Entry(name=name, state="invited" if now < expires else "lapsed", expires=expires)
        for name, expires in enrolments.invitations()
    ]
    revoked = [Entry(name=name, state="revoked", since=at) for name, at in enrolments.revoked()]
    return [*clinics, *invited, *revoked]


def expiring(enrolments: Enrolments) -> list[Clinic]:
    """Return the clinics whose keys expire within ``WARNING_DAYS``, or have expired."""
    soon = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=WARNING_DAYS)
    return [each for each in enrolments.clinics() if each.identity and each.expires < soon]


def _entry(clinic: Clinic, now: datetime.datetime) -> Entry:
    enrolled: State = "enrolled, by stick" if clinic.carrier == "stick" else "enrolled"
    state: State = enrolled if now < clinic.expires else "keys expired"
    return Entry(
        name=clinic.name,
        state=state if clinic.identity else "must enrol again",
        since=clinic.enrolled,
        seen=clinic.seen,
        expires=clinic.expires,
        fingerprint=clinic.identity.fingerprint if clinic.identity else "",
    )


def _text(moment: datetime.datetime | None) -> str:
    return "-" if moment is None else f"{moment:%Y-%m-%d %H:%M} UTC"
