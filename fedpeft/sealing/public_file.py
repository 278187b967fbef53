"""A public identity on disk: its text in one line, without any secret.

Whose identity it is, and what to do about a damaged file, the caller knows.
"""

from pathlib import Path

from fedpeft.sealing.identity import PublicIdentity
from fedpeft.storage import explained


def public_line(identity: PublicIdentity) -> bytes:
    """Return what the file of ``identity`` holds."""
    return f"{identity.to_text()}\n".encode("ascii")


def load_public_identity(path: Path) -> PublicIdentity:
    """Read a file of one :func:`public_line`; white space around it does not count.

    Raises:
        StorageError: the file cannot be read.
        SealingError: it holds no public identity of this release.
    """
    with explained("read", path):
        content = path.read_bytes()
    return PublicIdentity.from_text(content.decode("ascii", errors="replace").strip())
