"""Until when this box's keys are good, as the server said, and warnings ahead of that.

The connection key and the identity have an age of their own: renewing one does not renew the
other, and the membership ends with what ends first.
"""

import datetime
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cryptography import x509

from fedpeft.errors import StorageError
from fedpeft.storage import write_atomically

SCHEMA: Final = 1
WARNING_DAYS: Final = 30
_FILE: Final = "membership.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Expiry:
    """Until when the connection key is good, and the identity; None: not known."""

    key: datetime.datetime
    identity: datetime.datetime | None = None

    @classmethod
    def told(cls, document: Mapping[str, Any]) -> "Expiry":
        """Read what the server tells a member, or what :func:`keep_expiry` wrote.

        Raises:
            KeyError: it tells nothing; an older server does not.
            ValueError, TypeError: it is no time.
        """
        identity = document.get("identity_expires")
        return cls(
            key=_moment(document["keys_expire"]),
            identity=None if identity is None else _moment(identity),
        )


def renewal_in_progress(key: Path) -> Path:
    """Return where the key lies that is to take the place of ``key``, while that is done."""
    return key.with_name("key.next.pem")


def identity_in_progress(identity: Path) -> Path:
    """Return where the identity lies that is to take the place of the file ``identity``."""
    return identity.with_name("identity.next.key")


def keep_expiry(directory: Path, expiry: Expiry) -> None:
    """Write down until when the keys of the box in ``directory`` are good.

    Raises:
        StorageError: it cannot be written.
    """
    content = {"schema": SCHEMA, "keys_expire": _text(expiry.key)}
    if expiry.identity is not None:
        content["identity_expires"] = _text(expiry.identity)
    write_atomically(directory / _FILE, (json.dumps(content) + "\n").encode(), mode=0o600)


def expiry_of(directory: Path) -> Expiry | None:
    """Return until when the keys are good; None: the box joined with an older release.

    Raises:
        StorageError: the file is damaged.
    """
    path = directory / _FILE
    try:
        return Expiry.told(json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise StorageError(
            f"{path} cannot be read: remove it, and run: fedpeft-client rotate"
        ) from None


def keys_expire(directory: Path) -> datetime.datetime | None:
    """Return when the membership ends unless keys are renewed; None: not known.

    Raises:
        StorageError: the file is damaged.
    """
    expiry = expiry_of(directory)
    if expiry is None:
        return None
    return expiry.key if expiry.identity is None else min(expiry.key, expiry.identity)


def expiry_warnings(directory: Path, ca: Path) -> list[str]:
    """Return a sentence for what expires within ``WARNING_DAYS``, or has expired.

    Raises:
        StorageError: a file of the box is damaged.
    """
    soon = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=WARNING_DAYS)
    warnings: list[str] = []
    own = expiry_of(directory)
    if own is not None and own.key < soon:
        warnings.append(
            f"this box's keys expire at {own.key:%Y-%m-%d %H:%M} UTC; run: fedpeft-client rotate"
        )
    if own is not None and own.identity is not None and own.identity < soon:
        warnings.append(
            f"this box's identity expires at {own.identity:%Y-%m-%d %H:%M} UTC; run: "
            "fedpeft-client rotate --identity"
        )
    try:
        authority = x509.load_pem_x509_certificate(ca.read_bytes()).not_valid_after_utc
    except (OSError, ValueError):
        raise StorageError(
            f"{ca} cannot be read as a certificate: restore it from the backup"
        ) from None
    if authority < soon:
        warnings.append(
            f"the federation's certificate authority expires at {authority:%Y-%m-%d %H:%M} UTC; "
            "ask the central site for a new invitation before that"
        )
    return warnings


def _moment(text: str) -> datetime.datetime:
    return datetime.datetime.fromisoformat(text).astimezone(datetime.UTC)


def _text(moment: datetime.datetime) -> str:
    return moment.isoformat(timespec="seconds")
