"""What expires soon at this site, in sentences that say what to do about it."""

import datetime

from fedpeft_server.enrolment import Enrolments
from fedpeft_server.pki import Authority
from fedpeft_server.roster import WARNING_DAYS, expiring


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
    warnings += [
        f"the keys of {clinic.name} expire at {clinic.keys_expire:%Y-%m-%d %H:%M} UTC; on its box "
        "run: fedpeft-client rotate"
        for clinic in expiring(enrolments)
    ]
    return warnings
