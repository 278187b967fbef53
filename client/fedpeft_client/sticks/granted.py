"""Until when the keys are good that the central site granted in a file."""

from pathlib import Path

from fedpeft.errors import StickRefused
from fedpeft.sealing.join_file import Ticket
from fedpeft.sealing.renewal_file import RenewalConfirmation
from fedpeft_client.keys.key_life import Expiry


def expiry_in(granted: Ticket | RenewalConfirmation, path: Path) -> Expiry:
    """Return the moments in what was read from ``path``.

    Raises:
        StickRefused: they are none.
    """
    told = {"keys_expire": granted.keys_expire, "identity_expires": granted.identity_expires}
    try:
        return Expiry.told(told)
    except ValueError:
        raise StickRefused(f"{path} names no moment until which keys are good") from None
