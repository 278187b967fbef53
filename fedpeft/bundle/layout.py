"""How a bundle is laid out: names of its files, and the text that is signed.

``material/install.sh`` and ``material/check_signature.py`` know the same names, and
run where fedpeft is not installed yet. Must not know how files are read or written.
"""

import hashlib
import re
from collections.abc import Mapping
from typing import Final

from fedpeft.errors import SealingError

ROOT: Final = "fedpeft-offline"
"""The folder that a bundle unpacks to."""
FACTS: Final = "bundle.json"
SUMS: Final = "SHA256SUMS"
SIGNATURE: Final = "SHA256SUMS.sig"
SIGNER: Final = "signer.identity"
INSTALLER: Final = "install.sh"
WHEELS: Final = "wheels"
MODEL: Final = "model"
CONFIG: Final = "config"
SYSTEMD: Final = "systemd"
SCHEMA: Final = 1
"""Of ``bundle.json``."""
DOMAIN: Final = b"fedpeft offline bundle, version 1\x00"
_LINE: Final = re.compile(r"([0-9a-f]{64})  ([^\\\n]+)")


def signed(sums: bytes) -> bytes:
    """Return what the signature of a bundle is over; ``sums`` is its ``SHA256SUMS``."""
    return DOMAIN + hashlib.sha256(sums).digest()


def sums_of(digests: Mapping[str, str]) -> bytes:
    """Return ``SHA256SUMS``, in the form of sha256sum(1): name to hexadecimal SHA-256."""
    return "".join(f"{digests[name]}  {name}\n" for name in sorted(digests)).encode()


def read_sums(data: bytes) -> dict[str, str]:
    """Return name and SHA-256 of what :func:`sums_of` wrote.

    Raises:
        SealingError: it is not the one encoding of a list.
    """
    try:
        lines = [_LINE.fullmatch(line) for line in data.decode().splitlines()]
    except UnicodeDecodeError:
        lines = [None]
    digests = {line[2]: line[1] for line in lines if line is not None}
    if sums_of(digests) != data:
        raise SealingError(
            f"{SUMS} of the bundle is damaged: copy the bundle again, and compare its SHA-256"
        )
    return digests
