"""Check a bundle before it is unpacked, with the fedpeft that is installed already.

A bundle's own installer can be exchanged together with the bundle; this cannot.
"""

import hashlib
import json
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fedpeft.bundle import layout
from fedpeft.errors import SealingError, WrongSignature
from fedpeft.sealing.identity import PublicIdentity
from fedpeft.storage import explained

_SMALL: Final = 1 << 20
"""Bytes; the list of sums of a thousand files has a tenth of it."""
_READ_WHOLE: Final = (layout.FACTS, layout.SUMS, layout.SIGNATURE, layout.SIGNER)


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What a whole bundle says of itself; ``signer`` is the fingerprint of its key."""

    release: str
    signer: str
    model_fingerprint: str
    files: int


def check_bundle(path: Path, *, signer: str | None) -> Findings:
    """Check every file of a bundle against the signed list, without unpacking it.

    Args:
        path: the tar file.
        signer: the fingerprint that its key must have; None: any key.

    Raises:
        SealingError: it is no bundle, or damaged, cut short or added to.
        WrongSignature: the list is not signed by the bundle's key, or by another than ``signer``.
        StorageError: the file cannot be read.
    """
    with explained("read", path):
        digests, whole = _read(path)
    listed = layout.read_sums(whole[layout.SUMS])
    found = {n: d for n, d in digests.items() if n not in (layout.SUMS, layout.SIGNATURE)}
    if found != listed:
        odd = sorted({*found.items()} ^ {*listed.items()})[0][0]
        raise _damaged(path, f"{odd} is changed, missing or added")
    identity = PublicIdentity.from_text(whole[layout.SIGNER].decode("ascii", "replace").strip())
    try:
        signature = bytes.fromhex(whole[layout.SIGNATURE].decode("ascii", "replace").strip())
    except ValueError:
        raise _damaged(path, "its signature cannot be read") from None
    identity.verify(signature, layout.signed(whole[layout.SUMS]), source=f"the bundle {path.name}")
    if signer is not None and identity.fingerprint != signer.strip().lower():
        raise WrongSignature(
            f"{path} is signed by {identity.fingerprint} and not by {signer}: do not install it, "
            "and ask the central site by telephone"
        )
    facts = _facts(whole[layout.FACTS], path)
    return Findings(
        release=facts["release"],
        signer=identity.fingerprint,
        model_fingerprint=facts["model_fingerprint"],
        files=len(listed),
    )


def _read(path: Path) -> tuple[dict[str, str], dict[str, bytes]]:
    """Return the SHA-256 of every file below the root, and the content of the small ones."""
    digests: dict[str, str] = {}
    whole: dict[str, bytes] = {}
    try:
        with tarfile.open(path, mode="r|") as archive:
            for entry in archive:
                name = _name(entry, path)
                if name is None:
                    continue
                file = archive.extractfile(entry)
                if file is None or name in digests:
                    raise _damaged(path, f"{name} is there twice")
                if name in _READ_WHOLE:
                    whole[name] = file.read(_SMALL)
                    digests[name] = hashlib.sha256(whole[name]).hexdigest()
                else:
                    digests[name] = hashlib.file_digest(file, "sha256").hexdigest()  # pyright: ignore[reportArgumentType]
    except (tarfile.TarError, EOFError):
        raise _damaged(path, "it is cut short or no tar file") from None
    if missing := [name for name in _READ_WHOLE if name not in whole]:
        raise _damaged(path, f"it has no {missing[0]}")
    return digests, whole


def _name(entry: tarfile.TarInfo, path: Path) -> str | None:
    """Return the name below the root; None for a folder.

    Raises:
        SealingError: it is something else than a file or folder, or lies elsewhere.
    """
    root, _, name = entry.name.partition("/")
    inside = root == layout.ROOT and ".." not in name.split("/") and not name.startswith("/")
    if not inside or not (entry.isfile() or entry.isdir()):
        raise _damaged(path, f"{entry.name!r} has no place in it")
    return name if entry.isfile() else None


def _facts(data: bytes, path: Path) -> dict[str, Any]:
    facts: Any = json.loads(data)
    if not isinstance(facts, dict) or facts.get("schema") != layout.SCHEMA:
        raise SealingError(
            f"{path} is a bundle of another form than this release reads "
            f"({layout.SCHEMA}): it was made by a newer one, so follow its own notes"
        )
    if not re.fullmatch(r"[\w.+!]{1,64}", str(facts.get("release"))):
        raise _damaged(path, "its release cannot be read")
    return facts


def _damaged(path: Path, how: str) -> SealingError:
    return SealingError(
        f"{path} is not a whole fedpeft bundle ({how}): copy it again, and compare its SHA-256 "
        "with the central site's"
    )
