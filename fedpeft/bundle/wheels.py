"""The wheels of a bundle: where they come from, for which machines they are, how large.

Reads names of wheels (PEP 427) and their zip directories; loads nothing from them.
"""

import platform
import re
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Final

from fedpeft.errors import ConfigError, StorageError

PACKAGE: Final = "fedpeft"
_NAME: Final = re.compile(
    r"(?P<name>[\w.]+)-(?P<version>[\w.!+]+)(-\d\w*)?-(?P<py>[\w.]+)-(?P<abi>[\w.]+)-(?P<plat>[\w.]+)\.whl"
)
_EXACT: Final = re.compile(r"cp(\d)(\d+)")
_GLIBC: Final = re.compile(r"manylinux_(\d+)_(\d+)_(\w+)")
_OLD_GLIBC: Final = {"manylinux1": (2, 5), "manylinux2010": (2, 12), "manylinux2014": (2, 17)}
_LEAST_PYTHON: Final = "3.11"


@dataclass(frozen=True, kw_only=True)
class WheelFolder:
    """Wheels that install fedpeft, all for one kind of machine."""

    files: tuple[Path, ...]
    release: str
    """Version of fedpeft."""
    python: str
    """``3.11``: this one exactly; ``>=3.11``: where no wheel is compiled for one Python."""
    machine: str
    """As ``uname -m`` says it; ``any`` where nothing is compiled."""
    glibc: str
    """The least version of the C library, ``2.34``; ``0`` where nothing is compiled."""
    installed_bytes: int

    @classmethod
    def of(cls, directory: Path) -> "WheelFolder":
        """Look at the wheels in ``directory``.

        Raises:
            ConfigError: fedpeft or pip is missing, one package is there twice, a file is no
                wheel, or the wheels are for different machines.
        """
        files = tuple(sorted(directory.glob("*.whl")))
        tags = [_tags(path) for path in files]
        versions = _one_of_each(tags, directory)
        exact = {f"{tag[1]}.{tag[2]}" for each in tags if (tag := _EXACT.fullmatch(each["abi"]))}
        homes = [_home(each["plat"]) for each in tags]
        machines = {machine for machine, _ in homes if machine != "any"}
        for what, found in (("Pythons", exact), ("machines", machines)):
            if len(found) > 1:
                raise ConfigError(
                    f"the wheels in {directory} are for different {what} "
                    f"({', '.join(sorted(found))}): gather them anew for one kind of machine"
                )
        glibc = max((least for _, least in homes), default=(0, 0))
        return cls(
            files=files,
            release=versions[PACKAGE],
            python=next(iter(exact), f">={_LEAST_PYTHON}"),
            machine=next(iter(machines), "any"),
            glibc=f"{glibc[0]}.{glibc[1]}" if glibc != (0, 0) else "0",
            installed_bytes=sum(_unpacked(path) for path in files),
        )

    def for_this_machine(self) -> bool:
        """Say whether the wheels are for the Python and machine that this runs on."""
        here = f"{sys.version_info.major}.{sys.version_info.minor}"
        return self.machine in ("any", platform.machine()) and (
            self.python == here or self.python.startswith(">=")
        )


def gather_wheels(directory: Path, say: Callable[[str], None]) -> None:
    """Fetch or build into ``directory`` fedpeft's wheel, those it needs, and pip's.

    They are for the Python and machine that this runs on. Takes minutes and needs a
    package index, as it is configured for pip.

    Raises:
        StorageError: pip could not do it; names what to do instead.
    """
    source = Path(__file__).parents[2]
    wanted = str(source) if (source / "pyproject.toml").is_file() else _released()
    say("gathering the wheels with pip, which takes some minutes; --wheels takes a folder instead")
    if said := _pip("wheel", "--quiet", "--wheel-dir", str(directory), wanted, "pip"):
        raise StorageError(
            f"pip could not gather the wheels ({said}): gather them on a machine with a package "
            "index (pip wheel --wheel-dir DIR fedpeft pip), and name that folder by --wheels"
        )


def require_complete(folder: WheelFolder, directory: Path) -> None:
    """Check that pip finds everything that fedpeft needs in ``directory``, on this machine.

    Raises:
        ConfigError: something is missing; names it as pip does.
    """
    options = ["--dry-run", "--ignore-installed", "--quiet", "--isolated", "--no-index"]
    options += ["--only-binary", ":all:", "--find-links", str(directory)]
    if said := _pip("install", *options, f"{PACKAGE}=={folder.release}"):
        raise ConfigError(
            f"the wheels in {directory} do not install ({said}): gather them anew with "
            "pip wheel --wheel-dir DIR fedpeft pip"
        )


def _pip(*arguments: str) -> str:
    """Run this interpreter's pip; return what it said was wrong, "" if nothing was."""
    done = subprocess.run(  # noqa: S603 - our own interpreter, no shell
        [sys.executable, "-m", "pip", *arguments],
        check=False,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode == 0:
        return ""
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
    return errors[-1].removeprefix("ERROR: ") if errors else "it gave no reason"


def _released() -> str:
    return f"{PACKAGE}=={metadata.version(PACKAGE)}"


def _tags(path: Path) -> dict[str, str]:
    match = _NAME.fullmatch(path.name)
    if match is None or not zipfile.is_zipfile(path):
        raise ConfigError(f"{path} is no whole wheel: fetch it again, or take it out of the folder")
    return match.groupdict()


def _one_of_each(tags: list[dict[str, str]], directory: Path) -> dict[str, str]:
    """Return the version of each package."""
    names = [re.sub(r"[-_.]+", "-", each["name"]).lower() for each in tags]
    for needed in (PACKAGE, "pip"):
        if needed not in names:
            raise ConfigError(
                f"{directory} has no wheel of {needed}: gather the wheels with "
                "pip wheel --wheel-dir DIR fedpeft pip"
            )
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise ConfigError(
            f"{directory} has more than one wheel of {', '.join(twice)}: keep the one that is meant"
        )
    return {name: each["version"] for name, each in zip(names, tags, strict=True)}


def _home(platforms: str) -> tuple[str, tuple[int, int]]:
    """Return the machine that a wheel is for, and the least version of its C library."""
    found: list[tuple[str, tuple[int, int]]] = []
    for home in platforms.split("."):
        if home == "any":
            return "any", (0, 0)
        if match := _GLIBC.fullmatch(home):
            found.append((match[3], (int(match[1]), int(match[2]))))
        else:
            kind, _, machine = home.partition("_")
            if kind != "linux" and kind not in _OLD_GLIBC:
                raise ConfigError(
                    f"a wheel is for {home}, and bundles are for Linux with the GNU C library"
                )
            found.append((machine, _OLD_GLIBC.get(kind, (0, 0))))
    # A wheel that names several versions runs from the oldest of them on.
    return min(found, key=lambda each: each[1])


def _unpacked(path: Path) -> int:
    with zipfile.ZipFile(path) as wheel:
        return sum(entry.file_size for entry in wheel.infolist())
