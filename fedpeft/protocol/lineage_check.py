"""An adapter's directory against its signed lineage: is it what the server says it made?

Also says in words what made it. Reads files only.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fedpeft.adapters import AdapterState, load_settings_of
from fedpeft.adapters.peft_directory import WEIGHTS_FILE, recorded_base, weights_bytes
from fedpeft.errors import AdapterError, LineageRefused
from fedpeft.protocol.job import Job
from fedpeft.protocol.lineage import (
    LINEAGE_FILE,
    Lineage,
    Protection,
    SignedLineage,
    read_lineage,
)
from fedpeft.sealing import PublicIdentity
from fedpeft.storage import explained

_ADVICE: Final = "do not use the adapter; ask the central site for a new copy"
_MODES: Final = {
    "secagg": "under secure aggregation, so the server saw sums over these clinics only",
    "sealed": "sealed, and the server opened each clinic's update",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Ancestry:
    """A checked lineage, and which of the adapters before it were found beside it.

    ``checked`` are the rounds, descending, whose lineage and weights are there and are
    those that the signature vouches for; ``unchecked`` is the first round that is not there,
    None if the chain was followed to its start.
    """

    signed: SignedLineage
    checked: tuple[int, ...]
    unchecked: int | None


def check_directory(directory: Path, server: PublicIdentity) -> Ancestry:
    """Check the adapter in ``directory`` against its lineage and the server's identity.

    Raises:
        LineageRefused: there is no lineage, it was changed or not signed by ``server``, or
            the adapter's files, or those of an adapter before it, are others.
        StorageError: a file cannot be read.
    """
    path = directory / LINEAGE_FILE
    if not path.is_file():
        raise LineageRefused(
            f"{directory} has no {LINEAGE_FILE}, so nobody vouches for the adapter: it was made by "
            "a release before lineages, or the file was removed; ask the central site for a copy"
        )
    signed = read_lineage(_content(path), source=str(path))
    signed.require_signed(server)
    _require_files(directory, signed.lineage)
    checked, unchecked = _parents(directory, signed.lineage)
    return Ancestry(signed=signed, checked=checked, unchecked=unchecked)


def _require_files(directory: Path, lineage: Lineage) -> None:
    """Check the files that stand beside a lineage.

    Raises:
        LineageRefused: they are others.
    """
    digest = hashlib.sha256(_content(directory / WEIGHTS_FILE)).hexdigest()
    if digest != lineage.weights.sha256:
        raise LineageRefused(
            f"{directory / WEIGHTS_FILE} is not what the server signed for round {lineage.round} "
            f"(SHA-256 {digest[:12]}, signed {lineage.weights.sha256[:12]}): it was changed or is "
            f"of another round; {_ADVICE}"
        )
    try:
        settings, base = load_settings_of(directory), recorded_base(directory)
    except AdapterError as error:
        raise LineageRefused(f"{error}: {_ADVICE}") from None
    if (settings.rank, settings.alpha) != (lineage.weights.rank, lineage.weights.alpha):
        raise LineageRefused(
            f"{directory / 'adapter_config.json'} says rank {settings.rank} and alpha "
            f"{settings.alpha:g}, and the server signed {lineage.weights.rank} and "
            f"{lineage.weights.alpha:g}: it was changed; {_ADVICE}"
        )
    if base is not None and base != lineage.base.fingerprint:
        raise LineageRefused(
            f"{directory / 'fedpeft.json'} names base model {base[:12]}, and the server signed "
            f"{lineage.base.fingerprint[:12]}: it was changed; {_ADVICE}"
        )


def _parents(directory: Path, lineage: Lineage) -> tuple[tuple[int, ...], int | None]:
    """Follow the chain over the adapters that lie around ``directory``.

    Raises:
        LineageRefused: one is there and is not the one that the chain names.
    """
    found = dict(_lineages_around(directory))
    checked: list[int] = []
    while lineage.parent is not None:
        parent = lineage.parent
        if parent.lineage not in found:
            return tuple(checked), parent.round
        place, signed = found[parent.lineage]
        same = signed.lineage.weights.sha256 == parent.weights
        if (signed.lineage.round, same) != (parent.round, True):
            raise LineageRefused(
                f"the lineage in {place} is not of the adapter that round {lineage.round} names as "
                f"its parent: {_ADVICE}"
            )
        _require_files(place, signed.lineage)
        checked.append(parent.round)
        lineage = signed.lineage
    return tuple(checked), None


def _lineages_around(directory: Path) -> Iterator[tuple[str, tuple[Path, SignedLineage]]]:
    """Yield the lineages of a run or of a box's store, by their digests."""
    here = directory.resolve()
    # rounds/N/adapter beside each other, adapter beside rounds, adapters/NAME beside each other
    around: Iterable[Path] = (
        *here.parent.glob(f"*/{LINEAGE_FILE}"),
        *here.parent.parent.glob(f"*/adapter/{LINEAGE_FILE}"),
        *here.parent.glob(f"rounds/*/adapter/{LINEAGE_FILE}"),
    )
    for path in around:
        try:
            signed = read_lineage(_content(path), source=str(path))
        except LineageRefused:
            continue  # another's file; the chain will not find its parent here
        yield signed.digest, (path.parent, signed)


def arrived(text: str, server: PublicIdentity, job: Job) -> SignedLineage:
    """Return the lineage that came with ``job``, which the server was to sign for it.

    Raises:
        LineageRefused: it is none, was changed, or is of another adapter.
    """
    signed = read_lineage(text.encode(), source="what came with the server's adapter")
    signed.require_signed(server)
    lineage = signed.lineage
    named = (lineage.federation, lineage.run, lineage.round, lineage.base.fingerprint)
    if named != (job.federation, job.run, job.round, job.fingerprint):
        raise LineageRefused(
            f"the lineage that came with the adapter of round {job.round} is of another adapter: "
            "it is not used; install the same fedpeft release on both sides"
        )
    return signed


def to_keep(signed: SignedLineage | None, kept: AdapterState) -> bytes | None:
    """Return the file to keep beside an adapter; None if it is not the one that was signed.

    A clinic that keeps a factor of its own, or trains a lower rank, has another adapter than
    the server's, for which nobody vouches.
    """
    if signed is None:
        return None
    digest = hashlib.sha256(weights_bytes(kept)).hexdigest()
    return signed.to_bytes() if digest == signed.lineage.weights.sha256 else None


def sentences(found: Ancestry) -> list[str]:
    """Return in words what made an adapter, a line each: subject, tab, text."""
    lineage = found.signed.lineage
    return [
        f"adapter\tround {lineage.round} of federation {lineage.federation} (run {lineage.run}), "
        f"signed {lineage.time} by {found.signed.signer}",
        f"weights\tSHA-256 {lineage.weights.sha256}, rank {lineage.weights.rank}",
        f"base\tmodel {lineage.base.fingerprint}, quantization {lineage.base.quantization}",
        f"made by\t{_made_by(lineage)}",
        f"over all\t{_over_all(lineage)}",
        f"strategy\t{lineage.strategy}, {_MODES[lineage.mode]}",
        f"privacy\t{_privacy(lineage.privacy)}",
        f"parents\t{_chain(found)}",
    ]


def _made_by(lineage: Lineage) -> str:
    names = lineage.of_round()
    if lineage.parent is None:
        return "nobody's records: it is the adapter that the run began with"
    whose = ", ".join(names) or "no clinic"
    return f"the updates of {whose}, on the adapter of round {lineage.parent.round}"


def _over_all(lineage: Lineage) -> str:
    return (
        ", ".join(
            f"{name} ({one.fingerprint or 'fingerprint not known'}) in rounds {one.rounds}"
            for name, one in lineage.clinics.items()
        )
        or "no clinic"
    )


def _privacy(terms: Protection | None) -> str:
    if terms is None:
        return "no differential privacy: nothing bounds what the adapter tells about a record"
    spent, protected = terms.spent, f"each {terms.unit} protected, {terms.mechanism} noise"
    if spent is None:
        return f"{protected}; nothing spent yet"
    if spent.epsilon is None:
        return f"{protected}; spent without a bound at one clinic at the least"
    # Rounded up, so that it never looks smaller than it is.
    epsilon = math.ceil(spent.epsilon * 1000) / 1000
    return f"{protected}; spent at most epsilon {epsilon:.3f} at delta {spent.delta:g} at a clinic"


def _chain(found: Ancestry) -> str:
    if found.unchecked is None:
        count = len(found.checked)
        return f"all {count} adapters before it are here and are those that it names"
    here = f"rounds {found.checked[-1]} to {found.checked[0]} are here; " if found.checked else ""
    return f"{here}round {found.unchecked} and before are not here: the signature names them only"


def _content(path: Path) -> bytes:
    with explained("read", path):
        return path.read_bytes()


def report(found: Ancestry) -> dict[str, object]:
    """Return what was checked for programs."""
    return {
        "schema": 1,
        **json.loads(found.signed.to_bytes()),
        "parents_checked": list(found.checked),
        "parents_not_here_from": found.unchecked,
    }
