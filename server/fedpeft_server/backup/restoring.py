"""Make a site from a backup: everything is checked before the folder appears, by one rename.

A backup is a moment of the past. What has happened since cannot be known here, so what could
make the site weaker than it was is taken back (invitations) or said (clinics that were revoked).
"""

import shutil
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedpeft.audit_log import AuditLog
from fedpeft.counts import counted
from fedpeft.errors import EvidenceError, StorageError
from fedpeft.sealing.keyfile import Protection
from fedpeft.storage import explained, require_folder, sync_directory
from fedpeft_server.backup.archive import Manifest, read_backup
from fedpeft_server.backup.snapshot import finished_rounds
from fedpeft_server.site.check import check_site
from fedpeft_server.site.directory import open_site


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """What was restored: the last finished round (None: no run), and who is enrolled again.

    ``taken_back`` are invitations that were open; ``forgets_noise``, whether the server adds
    the noise, so that what it spent since the backup is not in the run's totals.
    """

    manifest: Manifest
    last_round: int | None
    clinics: tuple[str, ...]
    taken_back: tuple[str, ...]
    forgets_noise: bool


def restore(
    backup: Path, directory: Path, protection: Protection, say: Callable[[str], None]
) -> Restored:
    """Make the site ``directory`` from ``backup``.

    Args:
        backup: the file.
        directory: does not exist, or is empty; the folder that it is in is there.
        protection: how the file is encrypted.
        say: told how it goes.

    Raises:
        StorageError: the folder is not empty or cannot be written, or the file is no whole backup.
        KeyLocked: the secret is missing or wrong.
        EvidenceError: what is in the backup is damaged; nothing was restored.
    """
    _require_place(directory)
    with explained("write", directory):
        staged = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        with _told_as(directory, staged), explained("write", directory):
            say(f"reading {backup}")
            manifest = read_backup(backup, protection, staged)
            say(
                f"checking {counted(len(manifest.files), 'file')} and "
                f"{counted(manifest.rounds, 'round')}"
            )
            require_whole(staged, backup)
            restored = _made_good(staged, manifest)
            staged.replace(directory)
            sync_directory(directory.parent)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return restored


def _require_place(directory: Path) -> None:
    """Check, before a byte is read, that a site can be put at ``directory`` by one rename.

    Raises:
        StorageError: it cannot.
    """
    if directory.is_symlink():
        raise StorageError(
            f"{directory} is a symbolic link, whose place the site cannot take: name a new folder, "
            "where the link leads if that is what you want"
        )
    if directory.exists() and not directory.is_dir():
        raise StorageError(f"{directory} is a file; name a new folder for the restored site")
    with explained("look into", directory):
        if directory.is_dir() and any(directory.iterdir()):
            raise StorageError(f"{directory} is not empty; name a new folder for the restored site")
    if directory.resolve() == Path.cwd() or directory.is_mount():
        raise StorageError(
            f"{directory} is the folder that you are in, or a mount, so the site cannot take its "
            "place: go elsewhere, and name a new folder, inside of the mount if it is one"
        )
    require_folder(directory.parent)


@contextmanager
def _told_as(directory: Path, staged: Path) -> Generator[None]:
    """Name ``directory``, which a person asked for, where an error names ``staged``."""
    try:
        yield
    except StorageError as error:
        raise StorageError(str(error).replace(str(staged), str(directory))) from error


def require_whole(site: Path, backup: Path) -> None:
    """Check what was taken out of ``backup``.

    Raises:
        EvidenceError: it is damaged.
    """
    found = [each for each in check_site(site, site / "run") if each.is_damage]
    if found:
        text = found[0].text.replace(f"{site}/", "")
        raise EvidenceError(
            f"what {backup} holds was damaged when it was made, so nothing was restored; "
            f"findings: {len(found)}, the first: {found[0].area}: {text}; take another backup, or "
            "see all with fedpeft-server verify"
        )


def _made_good(staged: Path, manifest: Manifest) -> Restored:
    """Bring a site of the past into a state from which it can go on."""
    site, rounds = open_site(staged), finished_rounds(staged / "run")
    enrolments = site.enrolments()
    # Those that were taken up since would be good once more.
    taken_back = tuple(name for name, _ in enrolments.invitations())
    for name in taken_back:
        enrolments.revoke(name)
    AuditLog(site.audit).append(
        "key", {"event": "restored", "identity": site.sealing.public.fingerprint}
    )
    if rounds:
        shutil.copytree(
            staged / "run" / "rounds" / str(rounds[-1]) / "adapter", staged / "run" / "adapter"
        )
    privacy = site.federation.privacy
    return Restored(
        manifest=manifest,
        last_round=rounds[-1] if rounds else None,
        clinics=tuple(clinic.name for clinic in enrolments.clinics()),
        taken_back=taken_back,
        forgets_noise=privacy is not None and privacy.mechanism == "central",
    )
