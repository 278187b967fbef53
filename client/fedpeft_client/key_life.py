"""Until when this box's keys are good, as the server said, and warnings ahead of that."""

import datetime
import json
from pathlib import Path
from typing import Any, Final

from cryptography import x509

from fedpeft.errors import StorageError
from fedpeft.storage import write_atomically

SCHEMA: Final = 1
WARNING_DAYS: Final = 30
_FILE: Final = "membership.json"


def renewal_in_progress(key: Path) -> Path:
    """Return where the key lies that is to take the place of ``key``, while that is done."""
    return key.with_name("key.next.pem")


def keep_expiry(directory: Path, expires: datetime.datetime) -> None:
    """Write down until when the keys of the box in ``directory`` are good.

    Raises:
        StorageError: it cannot be written.
    """
    content = {"schema": SCHEMA, "keys_expire": expires.isoformat(timespec="seconds")}
    write_atomically(directory / _FILE, (json.dumps(content) + "\n").encode(), mode=0o600)


def keys_expire(directory: Path) -> datetime.datetime | None:
    """Return until when the keys are good; None: the box joined with an older release.

    Raises:
        StorageError: the file is damaged.
    """
    path = directory / _FILE
    try:
        content: Any = json.loads(path.read_bytes())
        return datetime.datetime.fromisoformat(content["keys_expire"]).astimezone(datetime.UTC)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        raise StorageError(
            f"{path} cannot be read: remove it, and run: fedpeft-client rotate"
        ) from None


def expiry_warnings(directory: Path, ca: Path) -> list[str]:
    """Return a sentence for what expires within ``WARNING_DAYS``, or has expired.

    Raises:
        StorageError: a file of the box is damaged.
    """
    soon = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=WARNING_DAYS)
    warnings: list[str] = []
    own = keys_expire(directory)
    if own is not None and own < soon:
        warnings.append(
            f"this box's keys expire at {own:%Y-%m-%d %H:%M} UTC; run: fedpeft-client rotate"
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
