"""The identity that signs a bundle: the site's own, or one that only signs bundles.

There is no unsigned bundle. Must not know what a bundle holds.
"""

from pathlib import Path

from fedpeft.sealing.identity import Identity
from fedpeft.sealing.keyfile import Protection, load_identity, save_identity


def bundle_key(path: Path, protection: Protection) -> tuple[Identity, bool]:
    """Return the identity in ``path``, and whether it was made now because there was none.

    Raises:
        KeyLocked: the passphrase or key file is missing or wrong.
        SealingError: the file is damaged.
        StorageError: other users can read the file, or it cannot be written.
    """
    if path.exists():
        return load_identity(path, protection), False
    identity = Identity.generate()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_identity(identity, path, protection)
    return identity, True
