"""Find out before a run whether this box can take part: one line a question."""

import os
import shutil
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import cache

import psutil

from fedpeft.data import read_records
from fedpeft.errors import (
    BaseNotAllowed,
    EnrolmentError,
    FedpeftError,
    LedgerDamaged,
    MemoryLimit,
    ModelError,
    SignerNotAllowed,
    StorageError,
)
from fedpeft.models import context_length, fingerprint, require_complete, require_fingerprint
from fedpeft.models.source import weight_files
from fedpeft_client.box import Box
from fedpeft_client.keys.key_life import (
    expiry_warnings,
    identity_in_progress,
    keys_expire,
    renewal_in_progress,
)
from fedpeft_client.keys.peers import key_fingerprint
from fedpeft_client.limits.working_hours import is_open, local_now, next_opening
from fedpeft_client.link.fleet import load_key
from fedpeft_client.link.reachability import probe
from fedpeft_client.rounds.clinic import allowed_bases
from fedpeft_client.sticks.memory import StickMemory
from fedpeft_client.sticks.renewing import RENEWING_FILE, is_renewing

_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Finding:
    """The answer to one question; ``text`` says what was found, or what is wrong and what to do."""

    subject: str
    ok: bool
    text: str


def check(box: Box, ask: Callable[[], str]) -> Generator[Finding]:
    """Yield a finding for each question about this box, as they become known.

    The questions: key, identity, policy, model, data, ledger, disk, memory, and server or, of a
    box without a network, stick. ``ask`` returns the identity's passphrase, where it has one.
    """
    ask = cache(ask)
    by_stick = box.settings.server.carrier == "stick"
    questions: dict[str, Callable[[Box], str]] = {
        "key": _key,
        "identity": lambda box: _identity(box, ask),
        "policy": _policy,
        "model": _model,
        "data": _data,
        "ledger": _ledger,
        "disk": _disk,
        "memory": _memory,
        **({"stick": lambda box: _stick(box, ask)} if by_stick else {"server": _server}),
    }
    for subject, question in questions.items():
        try:
            yield Finding(subject, True, question(box))
        except FedpeftError as error:
            yield Finding(subject, False, str(error))


def _key(box: Box) -> str:
    load_key(box.key)
    waiting = [
        path
        for path in (renewal_in_progress(box.key), identity_in_progress(box.identity_path))
        if path.exists()
    ]
    if waiting and not is_renewing(box.directory):
        raise EnrolmentError(
            f"{waiting[0]} is of a renewal that broke off: run fedpeft-client rotate once more"
        )
    expires = keys_expire(box.directory)
    until = "" if expires is None else f", good until {expires:%Y-%m-%d}"
    awaited = (
        f"; new keys await the confirmation of the central site, {box.directory / RENEWING_FILE} "
        "is the request for it"
        if waiting
        else ""
    )
    warnings = "".join(f"; WARNING: {each}" for each in expiry_warnings(box.directory, box.ca))
    return f"{box.key} is private{until}{awaited}{warnings}"


def _identity(box: Box, ask: Callable[[], str]) -> str:
    own, server = box.load_identity(ask).public, box.server_identity
    # The central site lists whole identities, other clinics are shown the signing key alone.
    return (
        f"fingerprint {own.fingerprint}; other clinics see the key "
        f"{key_fingerprint(own.signing_bytes)}; the server's fingerprint is {server.fingerprint}"
    )


def _policy(box: Box) -> str:
    """Say whether the rules let this box be ordered at all, and what of them holds now."""
    policy, server = box.settings.policy, box.server_identity.fingerprint
    if policy.signers is not None and server not in policy.signers:
        raise SignerNotAllowed(
            f"policy.signers in client.toml does not list the server that this box joined "
            f"({server}): its orders will be refused; compare the fingerprint by telephone and "
            "add it, or join the right federation"
        )
    bases = allowed_bases(box.settings)
    if bases is not None and (own := fingerprint(box.model)) not in bases:
        raise BaseNotAllowed(
            f"policy.base_models in client.toml does not list the base model of this box ({own}): "
            "all jobs will be refused; correct model.directory or that list"
        )
    now, hours = local_now(), "at any time"
    if policy.hours is not None:
        opening = f"again from {next_opening(policy.hours, now):%a %H:%M}"
        hours = "now" if is_open(policy.hours, now) else opening
    traffic = box.traffic()
    left = None if traffic is None else traffic.left()
    rest = "" if left is None else f"; {left // _MIB} MiB may still pass today"
    return f"training may run {hours}{rest}"


def _model(box: Box) -> str:
    directory = box.model
    require_complete(directory)
    if box.settings.model.fingerprint is not None:
        require_fingerprint(fingerprint(directory), box.settings.model.fingerprint, directory)
    context = context_length(directory)
    return (
        f"{directory}, fingerprint {fingerprint(directory)[:12]}, context "
        f"{context or 'unknown'} tokens"
    )


def _data(box: Box) -> str:
    data = box.settings.data
    read = [
        read_records(path, format=data.format, skip_bad_rows=data.skip_bad_rows).describe()
        for path in box.records
    ]
    note = "" if data.valid else "; no validation file, so this box reports no loss"
    return "; ".join(read) + note


def _ledger(box: Box) -> str:
    """Say what is spent of the privacy of those in any data of this box."""
    # Imported here: the accounting takes a second to load.
    from fedpeft.privacy.ledger import Ledger, ledger_exists
    from fedpeft_client.reports.ledger_view import ledger_reports, spent_text

    bound = box.settings.privacy.max_epsilon
    law = "no max_epsilon is set" if bound is None else f"max_epsilon = {bound:g}"
    if not ledger_exists(box.ledger_path):
        if not os.access(box.ledger_path.parent, os.W_OK):
            raise StorageError(
                f"the privacy ledger {box.ledger_path} cannot be made: its folder does not exist "
                "or may not be written; mend privacy.ledger in client.toml, or make the folder"
            )
        return f"{box.ledger_path} will be made with the first round; {law}"
    with Ledger(box.ledger_path) as ledger:
        if problems := ledger.verify():
            raise LedgerDamaged(
                f"{box.ledger_path}: {problems[0]}; see: fedpeft-client ledger verify"
            )
        spent = [spent_text(report.spent) for report in ledger_reports(ledger, box.law)]
    return f"{box.ledger_path} is intact; {law}; spent: {', '.join(spent) or 'nothing'}"


def _disk(box: Box) -> str:
    free = shutil.disk_usage(box.directory).free // _MIB
    wanted = box.settings.limits.min_free_disk_mb
    if free < wanted:
        raise StorageError(
            f"{free} MiB are free in {box.directory} where limits.min_free_disk_mb = {wanted}; "
            "free some space or lower that limit"
        )
    return f"{free} MiB free"


def _memory(box: Box) -> str:
    available = psutil.virtual_memory().available // _MIB
    # In 4 bits the base takes about a third of its file; that is the least it needs.
    least = sum(path.stat().st_size for path in weight_files(box.model)) // (3 * _MIB)
    if available < least:
        raise ModelError(
            f"{available} MiB of memory are available and the base model needs at least {least}; "
            "close other programs or use a smaller base model"
        )
    limit = box.settings.limits.max_memory_mb
    if limit is not None and limit < least:
        raise MemoryLimit(
            f"limits.max_memory_mb = {limit} in client.toml and the base model needs at least "
            f"{least} MiB; raise the limit or use a smaller base model"
        )
    allowed = "" if limit is None else f", of which the client takes at most {limit}"
    return f"{available} MiB available{allowed}"


def _stick(box: Box, ask: Callable[[], str]) -> str:
    """Say how rounds come to a box without a network, and how far they have come."""
    latest = StickMemory(box.directory, box.load_identity(ask)).latest
    last = "none has come yet" if latest is None else f"the last one was of round {latest[0]}"
    return f"no network is needed, rounds come as files; {last}"


def _server(box: Box) -> str:
    found = probe(box.settings.server.address, box.ca)
    return (
        f"{box.settings.server.address} answers in {found.latency_s * 1000:.0f} ms, clocks differ "
        f"by {abs(found.clock_skew_s):.0f} s"
    )
