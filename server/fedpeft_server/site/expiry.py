"""What expires soon at this site, in sentences that say what to do about it."""

import datetime

from fedpeft_server.enrolments.clinic import Clinic
from fedpeft_server.enrolments.enrolment import Enrolments
from fedpeft_server.enrolments.roster import WARNING_DAYS, expiring
from fedpeft_server.site.pki import Authority


def expiry_warnings(authority: Authority, enrolments: Enrolments) -> list[str]:
    """Return a sentence for everything that expires within ``WARNING_DAYS``, or has expired."""
    soon = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=WARNING_DAYS)
    warnings: list[str] = []
    if (ends := authority.server_certificate_expires()) < soon:
        remedy = (
            "ask the hospital's CA for a new one, and exchange the files of [tls]"
            if authority.issued
            else "run: fedpeft-server rotate"
        )
        warnings.append(f"the server's certificate expires at {ends:%Y-%m-%d %H:%M} UTC; {remedy}")
    if (ends := authority.ca_expires()) < soon:
        warnings.append(
            f"the certificate authority expires at {ends:%Y-%m-%d %H:%M} UTC, and clinics will "
            "not connect any more: make a new site before, and invite them to it"
        )
    return warnings + [_of_clinic(clinic) for clinic in expiring(enrolments)]


def _of_clinic(clinic: Clinic) -> str:
    key_first = clinic.keys_expire <= clinic.identity_expires
    what, option = ("keys", "") if key_first else ("identity", " --identity")
    verb = "expire" if key_first else "expires"
    return (
        f"the {what} of {clinic.name} {verb} at {clinic.expires:%Y-%m-%d %H:%M} UTC; on its box "
        f"run: fedpeft-client rotate{option}"
    )
