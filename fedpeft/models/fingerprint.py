"""Whether the base model here is the one that was agreed."""

from pathlib import Path

from fedpeft.errors import FingerprintMismatch
from fedpeft.weight_files import fingerprint as fingerprint


def require_fingerprint(found: str, expected: str, directory: Path) -> None:
    """Check that the base model in ``directory`` is the one that was agreed.

    Raises:
        FingerprintMismatch: it is another.
    """
    if found != expected:
        raise FingerprintMismatch(
            f"the base model in {directory} has fingerprint {found[:12]}, the federation uses "
            f"{expected[:12]}; name a copy of the federation's base model"
        )
