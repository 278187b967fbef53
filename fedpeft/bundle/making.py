"""Put a bundle together: what goes in, what must not, in which order, signed.

Knows neither where the wheels came from nor how the archive is written.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Final

from fedpeft.bundle import layout
from fedpeft.bundle.archive import Member, Observe, write_archive
from fedpeft.bundle.wheels import WheelFolder
from fedpeft.errors import ConfigError, StorageError
from fedpeft.sealing.identity import Identity
from fedpeft.sealing.public_file import public_line
from fedpeft.storage import explained

MATERIAL: Final = Path(str(files("fedpeft.bundle") / "material"))
_SECRET_MARKS: Final = (b"PRIVATE KEY-----", b'"fedpeft-identity"')
_CONFIG_LIMIT: Final = 16 << 20
_EPOCH: Final = "SOURCE_DATE_EPOCH"


@dataclass(frozen=True, kw_only=True)
class Ingredients:
    """What a bundle is made of; ``fingerprint`` is that of the base model in ``model``."""

    wheels: WheelFolder
    model: Path
    fingerprint: str
    config: tuple[Path, ...]
    signer: Identity


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A bundle that was written."""

    path: Path
    sha256: str
    """Of the tar file, hexadecimal: what a person compares by telephone."""
    size: int
    """Bytes."""


def make_bundle(
    ingredients: Ingredients, out: Path, begin: Callable[[int], Observe] = lambda _: lambda _: None
) -> Bundle:
    """Write the bundle to ``out``, whole or not at all.

    The bytes follow from the ingredients and ``SOURCE_DATE_EPOCH`` (seconds, default 0)
    alone: not from the time, the user, or the order of a directory.

    Args:
        ingredients: what goes in.
        out: the tar file; replaced if it exists.
        begin: told how many bytes there are to do, returns who is told of each part done.

    Raises:
        ConfigError: a configuration file is a private key, or two have the same name.
        StorageError: a file cannot be read or written, or changed meanwhile.
    """
    members = _members(ingredients)
    observe = begin(2 * sum(member.size for member in members))
    digests = {member.name: member.digest(observe) for member in members}
    sums = layout.sums_of(digests)
    signature = ingredients.signer.sign(layout.signed(sums)).hex() + "\n"
    for name, content in ((layout.SUMS, sums), (layout.SIGNATURE, signature.encode())):
        member = Member(name=name, content=content)
        digests[name] = member.digest(lambda _: None)
        members.append(member)
    # The installer comes last: where the end of a bundle is missing, there is none to run.
    members.sort(key=lambda member: (member.name == layout.INSTALLER, member.name))
    written = write_archive(
        out,
        layout.ROOT,
        [(member, digests[member.name]) for member in members],
        moment=_moment(),
        observe=observe,
    )
    return Bundle(path=out, sha256=written, size=out.stat().st_size)


def _members(given: Ingredients) -> list[Member]:
    """Return everything that has a SHA-256 in the list, in no order."""
    with explained("read", given.model):
        model = [path for path in given.model.iterdir() if path.is_file() and path.name[0] != "."]
    members = [_in(layout.WHEELS, path) for path in given.wheels.files]
    members += [_in(layout.MODEL, path) for path in model]
    members += [_in(layout.CONFIG, _harmless(path)) for path in given.config]
    members += [_in(layout.SYSTEMD, path) for path in (MATERIAL / "systemd").iterdir()]
    members += [
        Member(name=layout.FACTS, content=_facts(given)),
        Member(name=layout.SIGNER, content=public_line(given.signer.public)),
        Member(name="check_signature.py", content=MATERIAL / "check_signature.py"),
        Member(name=layout.INSTALLER, content=MATERIAL / layout.INSTALLER, executable=True),
    ]
    names = [member.name for member in members]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two files would be {name} of the bundle: rename one of them")
        if not name.isprintable() or "\\" in name:
            raise ConfigError(f"{name!r} cannot be the name of a file of a bundle: rename it")
    return members


def _in(folder: str, path: Path) -> Member:
    return Member(name=f"{folder}/{path.name}", content=path)


def _harmless(path: Path) -> Path:
    """Return a configuration file, unless it holds what must never leave its machine."""
    with explained("read", path):
        if path.stat().st_size > _CONFIG_LIMIT:
            raise ConfigError(
                f"{path} has more than {_CONFIG_LIMIT >> 20} MiB, which no configuration has: "
                "--config is for settings and templates"
            )
        content = path.read_bytes()
    if any(mark in content for mark in _SECRET_MARKS):
        raise ConfigError(
            f"{path} holds a private key, which never leaves its machine: take it out of --config; "
            "each box makes its own keys when it joins"
        )
    return path


def _facts(given: Ingredients) -> bytes:
    """Return ``bundle.json``, a line a fact so that a shell can read it too."""
    wheels = given.wheels
    facts = {
        "schema": layout.SCHEMA,
        "release": wheels.release,
        "python": wheels.python,
        "machine": wheels.machine,
        "glibc": wheels.glibc,
        "installed_kib": -(-wheels.installed_bytes // 1024),
        "model_fingerprint": given.fingerprint,
    }
    return (json.dumps(facts, indent=0) + "\n").encode()


def _moment() -> int:
    told = os.environ.get(_EPOCH, "0")
    if not (told.isascii() and told.isdigit() and len(told) < len("10000000000000")):
        raise ConfigError(
            f"the environment variable {_EPOCH} = {told!r} is no number of seconds: unset it"
        )
    return int(told)


def require_outside(out: Path, *folders: Path) -> None:
    """Check that the bundle would not be written into what it is made of.

    Raises:
        StorageError: it would.
    """
    for folder in folders:
        if out.resolve().parent == folder.resolve():
            raise StorageError(f"{out} lies among what goes into it: name another place by --out")
