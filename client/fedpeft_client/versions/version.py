"""One version of the adapter on a box: a stock PEFT directory, and a file that says what it is.

    adapter/        stock PEFT, with fedpeft.json (see fedpeft.adapters) and, if it came with
                    it, lineage.json: what made it, signed by the server
    about.json      where it comes from, digests of those files, and the verdict on it

The verdict rests on the clinic's records, so it lies outside of what may be handed on.
Knows of no other version, and not which one is in use.
"""

import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedpeft.errors import AdapterError
from fedpeft.storage import write_atomically
from fedpeft_client.versions.acceptance import Verdict

if TYPE_CHECKING:
    from fedpeft.adapters import AdapterState
    from fedpeft.config import AdapterSettings

# As in fedpeft.adapters, which is not imported: torch takes seconds to load, and more
# memory than a small model.
CONFIG_FILE: Final = "adapter_config.json"
WEIGHTS_FILE: Final = "adapter_model.safetensors"
ABOUT_FILE: Final = "about.json"
LINEAGE_FILE: Final = "lineage.json"
STOCK: Final = "adapter"
"""The folder with nothing but the adapter itself."""
_Stamp = tuple[Path, int, int, int, int]
_known: dict[_Stamp, str] = {}
"""Digests that this process has computed, by path, size, inode and times of change."""


class About(BaseModel):
    """What ``about.json`` says (schema 1).

    ``federation``, ``run`` and ``round`` are None of an adapter that an older release
    received. ``files`` holds the SHA-256 of every file of ``adapter/``, ``received`` is in UTC.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)
    layout: Literal[1] = Field(default=1, alias="schema")
    name: str
    federation: str | None = None
    run: str | None = None
    round: int | None = None
    base_fingerprint: str | None = None
    received: str
    files: dict[str, str]
    verdict: Verdict


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """An adapter as it came: its values on the base model ``base_name``, and from which round.

    ``lineage`` is the signed file that came with it, as it is.
    """

    state: "AdapterState"
    settings: "AdapterSettings"
    base_name: str
    federation: str
    run: str
    round: int
    lineage: bytes | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """A version that lies in ``folder``."""

    folder: Path
    about: About

    @property
    def path(self) -> Path:
        """The stock PEFT directory."""
        return self.folder / STOCK

    @property
    def name(self) -> str:
        """What people and programs call it; it never stands for another adapter."""
        return self.about.name

    @property
    def digest(self) -> str:
        """The SHA-256 of its weights, 64 hex digits."""
        return self.about.files[WEIGHTS_FILE]

    @property
    def identity(self) -> str:
        """What makes it this version: run, round and content."""
        return identity_of(self.about.run, self.about.round, self.digest)

    @property
    def verdict(self) -> Verdict:
        """Why it was taken into use when it came, or was not."""
        return self.about.verdict

    @property
    def size_bytes(self) -> int:
        """Bytes of its files."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())

    def require_intact(self) -> "Version":
        """Return itself if each file is as it was when it came.

        Raises:
            AdapterError: one was changed, damaged or removed.
        """
        for name, expected in self.about.files.items():
            if digest_of(self.path / name) != expected:
                raise AdapterError(
                    f"the adapter {self.name} is damaged: {self.path / name} is not the file that "
                    "came from the server; restore it from a backup, or use another version and "
                    f"remove this one (fedpeft-client adapters remove {self.name})"
                )
        return self


def identity_of(run: str | None, number: int | None, digest: str) -> str:
    """Return what tells a version from all others."""
    return f"{run or '-'}/{'-' if number is None else number}/{digest}"


def read_version(folder: Path) -> Version:
    """Return the version in ``folder``.

    Raises:
        AdapterError: its ``about.json`` is missing or damaged.
    """
    try:
        about = About.model_validate_json((folder / ABOUT_FILE).read_bytes())
        if about.name != folder.name or not {CONFIG_FILE, WEIGHTS_FILE} <= about.files.keys():
            raise ValueError  # put into words below
    except (OSError, ValueError, ValidationError):
        raise AdapterError(
            f"{folder / ABOUT_FILE} is missing or damaged, so it is unknown what that adapter "
            f"is; remove it with: fedpeft-client adapters remove {folder.name}"
        ) from None
    return Version(folder=folder, about=about)


def about_arrival(arrival: Arrival, name: str, files: dict[str, str], verdict: Verdict) -> About:
    """Return the description of an adapter that has just come."""
    return About(
        name=name,
        federation=arrival.federation,
        run=arrival.run,
        round=arrival.round,
        base_fingerprint=arrival.state.schema.fingerprint,
        received=_now(),
        files=files,
        verdict=verdict,
    )


def about_earlier(name: str, files: dict[str, str], verdict: Verdict) -> About:
    """Return the description of an adapter of which nothing is known but its files."""
    return About(name=name, received=_now(), files=files, verdict=verdict)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def write_about(folder: Path, about: About) -> None:
    """Write ``about.json``.

    Raises:
        StorageError: the folder cannot be written.
    """
    text = about.model_dump_json(indent=2, by_alias=True)
    write_atomically(folder / ABOUT_FILE, (text + "\n").encode())


def digests_in(directory: Path) -> dict[str, str]:
    """Return the SHA-256 of each file, by its name."""
    files = sorted(path for path in directory.iterdir() if path.is_file())
    return {path.name: digest_of(path) or "" for path in files}


def digest_of(path: Path) -> str | None:
    """Return the SHA-256 of a file, computed once while it stays the same; None without one."""
    try:
        status = path.stat()
        stamp = (path, status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns)
        if stamp not in _known:
            with path.open("rb") as file:
                _known[stamp] = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None
    return _known[stamp]
