"""Whether what a site has on disk is whole and belongs together: ``fedpeft-server verify``.

Reads only, and in the order in which a backup is taken, so that a running server disturbs
nothing. What each check looks at is in docs/operations.md.
"""

import json
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization

from fedpeft.audit_log import all_lines, verify
from fedpeft.counts import counted
from fedpeft.errors import FedpeftError, StorageError
from fedpeft.sealing import PublicIdentity
from fedpeft.sealing.succession import Succession
from fedpeft_server.backup.snapshot import database_copy
from fedpeft_server.link.message_store import require_sound
from fedpeft_server.migrations import HEAD
from fedpeft_server.runs.check import Finding, LogFacts, RunCheck, damage, sound
from fedpeft_server.site.directory import Site, open_site, require_no_box

_OTHERS: Final = 0o077
_PRIVATE_FOLDERS: Final = ("keys", "state", "audit")
_GONE: Final = {"removed", "revoked"}


def check_site(directory: Path, results: Path) -> Iterator[Finding]:
    """Yield what is found in the site, whose run lies in ``results``, one area after another.

    Raises:
        StorageError: ``directory`` is none.
        ConfigError: it is a clinic's box.
    """
    if not directory.is_dir():
        raise StorageError(f"{directory} is no folder: name the site with --dir")
    require_no_box(directory, f"run fedpeft-client check {directory}")
    opened = _Tried(lambda: open_site(directory))
    site = opened.value
    yield opened.finding("configuration", "federation.toml and server.toml can be read")
    yield from _permissions(directory)
    if site is not None:
        yield from _keys(site)
    identities = _identities(site) if site is not None else []
    run = RunCheck(results, identities)
    yield from run.findings()
    facts = LogFacts(wanted=run.log_ends)
    yield from _log(directory / "audit", identities, facts)
    yield from run.findings_of_log(facts)
    yield from _enrolments(directory / "state" / "enrolment.db", facts)
    yield from _messages(directory / "state" / "flower.db")


@dataclass
class _Tried:
    """The value of a call, or the sentence with which it failed."""

    call: Callable[[], Site]
    value: Site | None = None
    failure: str = field(default="")

    def __post_init__(self) -> None:
        try:
            self.value = self.call()
        except FedpeftError as error:
            self.failure = str(error)

    def finding(self, area: str, text: str) -> Finding:
        return damage(area, self.failure) if self.failure else sound(area, text)


def _permissions(directory: Path) -> Iterator[Finding]:
    folders = [path for name in _PRIVATE_FOLDERS if (path := directory / name).is_dir()]
    private = [
        *(path for folder in folders for path in sorted(folder.glob("*.key"))),
        *(path for folder in folders for path in sorted(folder.glob("*.db"))),
        *(path for folder in folders for path in sorted(folder.glob("*.jsonl"))),
    ]
    public = directory / "keys" / "succession.jsonl"
    open_ = [path for path in (*folders, *private) if path.stat().st_mode & _OTHERS]
    open_ = [path for path in open_ if path != public]
    for path in open_:
        mode = "700" if path.is_dir() else "600"
        yield damage(
            "permissions", f"{path} is open to other users of this machine: chmod {mode} it"
        )
    if not open_:
        yield sound("permissions", "keys, databases and logs are closed to other users")


def _identities(site: Site) -> list[PublicIdentity]:
    """Return the site's identities, the present one first."""
    earlier = [Succession.from_json(line).old for line in site.sealing.succession]
    return [site.sealing.public, *reversed(earlier)]


def _keys(site: Site) -> Iterator[Finding]:
    problems: list[str] = []
    try:
        site.authority.require_usable(site.listen.address)
    except FedpeftError as error:
        problems.append(str(error))
    if site.authority.issued is None and not _fits(
        site.authority.ca_key, site.authority.ca_certificate
    ):
        problems.append(
            f"{site.authority.ca_key} is not the key of {site.authority.ca_certificate}, so the "
            "server's certificate cannot be renewed: restore both from one backup"
        )
    private = site.sealing.directory / "identity.key"
    try:
        # Whose it is stands in the clear, also where it is encrypted.
        public = json.loads(private.read_bytes())["public"]
    except (OSError, ValueError, KeyError, TypeError):
        public = None
    if public != site.sealing.public.digest.hex():
        problems.append(
            f"{private} is damaged or is not the private half of identity.pub: restore both from "
            "one backup"
        )
    yield from (damage("keys", problem) for problem in problems)
    if not problems:
        yield sound(
            "keys", f"certificate, authority and identity fit: {site.sealing.public.fingerprint}"
        )


def _fits(key: Path, certificate: Path) -> bool:
    try:
        private = serialization.load_pem_private_key(key.read_bytes(), None)
        issued = x509.load_pem_x509_certificate(certificate.read_bytes())
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm):
        return False
    return private.public_key() == issued.public_key()


def _log(directory: Path, identities: list[PublicIdentity], facts: LogFacts) -> Iterator[Finding]:
    own, *earlier = identities or [None]
    known = [each for each in earlier if each is not None]
    try:
        verdict = verify(directory, identity=own, earlier=known)
        facts.read(all_lines(directory))
    except FedpeftError as error:
        yield damage("audit log", str(error))
        return
    yield from (damage("audit log", problem) for problem in verdict.problems)
    if not verdict.problems:
        yield sound(
            "audit log",
            f"{counted(verdict.entries, 'entry', 'entries')}, signed up to {verdict.signed}, end "
            f"{verdict.end.seq}:{verdict.end.hash}",
        )


def _enrolments(path: Path, facts: LogFacts) -> Iterator[Finding]:
    area = "enrolments"
    if not path.is_file():
        missing = bool(facts.clinics)
        text = f"{path} is missing"
        yield damage(area, f"{text}: restore it") if missing else sound(area, f"{text}: nobody yet")
        return
    try:
        found, schema, names = _database_facts(path)
    except StorageError as error:
        yield damage(area, str(error))
        return
    except sqlite3.Error as error:
        yield damage(area, f"{path} is damaged ({error}): restore it from a backup")
        return
    problems: list[str] = []
    if found != "ok":
        problems.append(f"{path} is damaged ({found}): restore it from a backup")
    if not 0 < schema <= int(HEAD):
        problems.append(
            f"{path} has schema {schema}, this release knows those up to {int(HEAD)}: use the "
            "release that wrote it"
        )
    problems += [
        f"{name} is enrolled, and the audit log says that it was {facts.clinics[name]}: an older "
        f"enrolment.db was put back; fedpeft-server revoke {name}, or invite it anew"
        for name in names
        if facts.clinics.get(name) in _GONE
    ]
    yield from (damage(area, problem) for problem in problems)
    if not problems:
        yield sound(area, f"schema {schema}, {counted(len(names), 'clinic')}")


def _database_facts(path: Path) -> tuple[str, int, list[str]]:
    """Return what SQLite says of the file, its schema, and the enrolled clinics."""
    with database_copy(path) as copy:
        (found,) = copy.execute("PRAGMA integrity_check(1)").fetchone()
        (schema,) = copy.execute("PRAGMA user_version").fetchone()
        names = [name for (name,) in copy.execute("SELECT name FROM clinics ORDER BY name")]
    return found, schema, names


def _messages(path: Path) -> Iterator[Finding]:
    if not path.is_file():
        yield sound("messages", "no message store yet: the next start makes one")
        return
    try:
        require_sound(path)
    except FedpeftError as error:
        yield damage("messages", str(error))
    else:
        yield sound("messages", "the store of messages under way is whole")
