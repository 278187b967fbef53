"""A clinic's request to have its keys renewed: who asks, and for what.

One statement renews the connection key or the identity, never both. Must not know HTTP or
Flower.
"""

from dataclasses import dataclass
from typing import Final

from fedpeft.errors import EnrolmentError, SealingError
from fedpeft.sealing.context import clinic_role
from fedpeft.sealing.succession import Succession
from fedpeft_server.enrolments.enrolment import Enrolments
from fedpeft_server.enrolments.shown_keys import canonical_public_key

_PREFIX: Final = clinic_role("")


@dataclass(frozen=True, kw_only=True)
class Renewed:
    """``old_key`` (PEM) made way for ``new_key``; empty where that stays as it was."""

    name: str
    old_key: str
    new_key: str


def renew_clinic(enrolments: Enrolments, request: str) -> Renewed:
    """Do what a clinic's signed statement asks for; the same statement may come again.

    Raises:
        EnrolmentError: it is no statement of an enrolled clinic about its present keys.
    """
    try:
        asked = Succession.from_json(request)
    except SealingError as error:
        raise EnrolmentError(
            "what was sent is no renewal of a clinic's keys: use this fedpeft version there"
        ) from error
    name = asked.holder.removeprefix(_PREFIX)
    clinic = next((each for each in enrolments.members() if each.name == name), None)
    known = (asked.old, asked.new)
    if (
        clinic is None
        or asked.holder != clinic_role(name)
        or asked.federation != enrolments.federation
        or clinic.identity not in known
    ):
        raise EnrolmentError(
            "the renewal is not of the keys by which this server knows the clinic: join anew"
        )
    key = canonical_public_key(asked.key)
    if asked.old != asked.new:
        enrolments.succeed(name, key, asked)
        return Renewed(name=name, old_key="", new_key=key)
    old = enrolments.renew(name, (key, asked.new.to_text()))
    return Renewed(name=name, old_key=old, new_key=key)
