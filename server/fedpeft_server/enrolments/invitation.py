"""The invitation file: all that one clinic needs to join, and to recognise the server."""

import datetime
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fedpeft.sealing.identity import PublicIdentity
from fedpeft.storage import explained, write_once

FILE_SCHEMA: Final = 2


@dataclass(frozen=True, kw_only=True)
class Invitation:
    """What one clinic needs to join; the file form is secret until it is used.

    ``fingerprint`` is the base model's, ``identity`` the server's: the clinic
    pins it, and from then on takes what is sealed to it from nobody else.
    """

    server: str
    ca_pem: str
    federation: str
    clinic: str
    fingerprint: str
    identity: PublicIdentity
    token: str
    expires: datetime.datetime

    def __repr__(self) -> str:
        # The token would otherwise end up in a traceback or a log.
        return f"Invitation(clinic={self.clinic!r}, expires={self.expires.isoformat()})"

    def to_json(self) -> str:
        """Return the text of the invitation file."""
        return json.dumps(
            {
                "schema": FILE_SCHEMA,
                "server": self.server,
                "federation": self.federation,
                "clinic": self.clinic,
                "base_model": self.fingerprint,
                "expires": self.expires.isoformat(timespec="seconds"),
                "token": self.token,
                "identity": self.identity.to_text(),
                "ca": self.ca_pem,
            },
            indent=2,
            ensure_ascii=False,
        )

    def write(self, path: Path) -> None:
        """Write the invitation to a new file, mode 600.

        Raises:
            StorageError: the file exists or cannot be written.
        """
        with explained("write the invitation", path):
            write_once(path, self.to_json().encode(), mode=0o600)
