"""Whether the rounds of a run on disk are what was signed, and what the audit log tells of them.

Reads only.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from fedpeft.adapters.peft_directory import WEIGHTS_FILE, read_tensors
from fedpeft.audit_log import Line
from fedpeft.errors import FedpeftError
from fedpeft.protocol.lineage import LINEAGE_FILE, SignedLineage, read_lineage
from fedpeft.protocol.lineage_check import check_directory
from fedpeft.sealing import PublicIdentity
from fedpeft.storage import explained
from fedpeft_server.backup.snapshot import finished_rounds
from fedpeft_server.runs.directory import RoundRecord

_MEMBERSHIP: Final = {"enrolled", "admitted", "removed", "revoked"}
_ADVICE: Final = (
    "restore the site from a backup, or remove the directory of that round and of those after it, "
    "and the run goes on from the one before"
)


@dataclass(frozen=True, slots=True)
class Finding:
    """What was looked at, and what is so; ``is_damage`` where somebody has to act."""

    area: str
    text: str
    is_damage: bool

    def line(self) -> str:
        """Return it as a line: area, tab, ``ok`` or ``damaged``, tab, sentence."""
        return f"{self.area}\t{'damaged' if self.is_damage else 'ok'}\t{self.text}"


def damage(area: str, text: str) -> Finding:
    """Return a finding that somebody has to act on."""
    return Finding(area, text, is_damage=True)


def sound(area: str, text: str) -> Finding:
    """Return a finding that all is well."""
    return Finding(area, text, is_damage=False)


@dataclass
class LogFacts:
    """What an audit log tells of rounds and clinics.

    ``wanted`` are numbers of entries whose hash is needed, and ``hashes`` has them;
    ``adapters`` are the digests of the lineages that it names; ``clinics`` has, for
    each, whether it was enrolled, admitted, removed or revoked last.
    """

    wanted: dict[int, str]
    hashes: dict[int, str] = field(default_factory=dict[int, str])
    adapters: set[str] = field(default_factory=set[str])
    clinics: dict[str, str] = field(default_factory=dict[str, str])

    def read(self, lines: Iterable[Line]) -> None:
        """Take in the entries; a line that is none is for others to find."""
        for line in lines:
            if line.is_torn or (written := line.read()) is None:
                continue
            entry, about = written.entry, written.entry.about
            if entry.seq in self.wanted:
                self.hashes[entry.seq] = written.hash
            if entry.kind == "adapter":
                self.adapters.add(str(about.get("lineage")))
            elif entry.kind == "key" and about.get("event") in _MEMBERSHIP:
                self.clinics[str(about.get("name"))] = str(about["event"])


class RunCheck:
    """The finished rounds in ``directory``; ``identities`` are the site's, the present one first.

    ``log_ends`` has, after :meth:`findings`, number and hash of the entries of the audit log
    that the lineages name.
    """

    def __init__(self, directory: Path, identities: list[PublicIdentity]) -> None:
        self._directory = directory
        self._identities = {each.fingerprint: each for each in identities}
        self._before: tuple[SignedLineage | None, str] = None, ""
        self._lineages: dict[int, SignedLineage] = {}
        self.log_ends: dict[int, str] = {}

    def findings(self) -> Iterator[Finding]:
        """Yield a finding for each round, and one for what is published."""
        if not (self._directory / "run.json").is_file():
            yield sound("run", "no run yet")
            return
        try:
            run = json.loads((self._directory / "run.json").read_bytes()).get("id")
        except (OSError, ValueError, AttributeError):
            yield damage(
                "run", f"{self._directory / 'run.json'} is damaged: restore it from a backup"
            )
            return
        rounds, whole = finished_rounds(self._directory), True
        for number in rounds:
            problem = self._problem_of(number, run)
            whole = whole and not problem
            yield (
                damage(f"round {number}", problem)
                if problem
                else sound(f"round {number}", self._told(number))
            )
        if rounds and whole:
            yield self._chain(rounds[-1])
        yield from self._beside(rounds)

    def findings_of_log(self, facts: LogFacts) -> Iterator[Finding]:
        """Yield what the audit log should tell of the rounds, and does not."""
        for number, signed in self._lineages.items():
            end = signed.lineage.log
            if end is None:
                continue
            if facts.hashes.get(end.seq) != end.hash:
                yield damage(
                    f"round {number}",
                    f"its lineage names entry {end.seq} of the audit log, which is missing there "
                    "or another: the log is older than the round, or was changed",
                )
            elif signed.digest not in facts.adapters:
                yield damage(
                    f"round {number}",
                    "the audit log does not tell that its adapter was made: the log is older than "
                    "the round, or was changed",
                )

    def _told(self, number: int) -> str:
        signed = self._lineages.get(number)
        if signed is None:
            return "whole; made by a release before lineages, so nobody vouches for it"
        names = ", ".join(signed.lineage.of_round()) or "the start"
        return f"whole, signed {signed.lineage.time}: {names}"

    def _problem_of(self, number: int, run: object) -> str:
        """Return what is wrong with a round; "" if nothing."""
        folder = self._directory / "rounds" / str(number)
        try:
            record = RoundRecord.model_validate_json((folder / "round.json").read_bytes())
            for path in sorted(folder.rglob("*.safetensors")):
                read_tensors(path, _ADVICE)
            path = folder / "adapter" / LINEAGE_FILE
            signed = read_lineage(path.read_bytes(), source=str(path)) if path.exists() else None
        except (OSError, ValidationError):
            return f"{folder / 'round.json'} or a file beside it cannot be read: {_ADVICE}"
        except FedpeftError as error:
            return str(error)
        needed = {"strategy": record.has_memory, "product": record.has_product}
        for name, is_needed in needed.items():
            if is_needed and not (folder / f"{name}.safetensors").is_file():
                return f"{folder / name}.safetensors is missing: {_ADVICE}"
        if record.round != number:
            return f"{folder} holds round {record.round}: {_ADVICE}"
        return self._lineage_problem(number, run, signed)

    def _lineage_problem(self, number: int, run: object, signed: SignedLineage | None) -> str:
        (before, weights_before), self._before = self._before, (signed, "")
        if signed is None:
            return (
                f"its lineage is missing, and round {number - 1} has one: {_ADVICE}"
                if before
                else ""
            )
        lineage = signed.lineage
        self._before = signed, lineage.weights.sha256
        self._lineages[number] = signed
        if lineage.log is not None:
            self.log_ends[lineage.log.seq] = lineage.log.hash
        if (lineage.run, lineage.round) != (run, number):
            return f"its lineage is of round {lineage.round} of run {lineage.run}: {_ADVICE}"
        parent = lineage.parent
        if before is not None and (
            parent is None or (parent.lineage, parent.weights) != (before.digest, weights_before)
        ):
            return f"its lineage does not name round {number - 1} as its parent: {_ADVICE}"
        signer = self._identities.get(signed.signer)
        if signer is None:
            return f"its lineage was signed by {signed.signer}, which is not this site: {_ADVICE}"
        return self._directory_problem(number, signer, signed)

    def _directory_problem(self, number: int, signer: PublicIdentity, signed: SignedLineage) -> str:
        try:
            signed.require_signed(signer)
            weights = _weights(self._directory / "rounds" / str(number) / "adapter")
        except FedpeftError as error:
            return str(error)
        if weights != signed.lineage.weights.sha256:
            return f"its weights are not those that were signed: {_ADVICE}"
        return ""

    def _chain(self, last: int) -> Finding:
        """Follow the last round's lineage to the start, adapter settings included."""
        signed = self._lineages.get(last)
        if signed is None:
            return sound("run", f"rounds 0 to {last}; there is no lineage to follow")
        folder = self._directory / "rounds" / str(last) / "adapter"
        try:
            check_directory(folder, self._identities[signed.signer])
        except FedpeftError as error:
            return damage("run", str(error))
        return sound("run", f"{signed.lineage.run}: rounds 0 to {last}, one chain of lineages")

    def _beside(self, rounds: list[int]) -> Iterator[Finding]:
        known = {each.lineage.weights.sha256 for each in self._lineages.values()}
        adapter = self._directory / "adapter"
        if known and adapter.is_dir():
            try:
                stands = _weights(adapter) in known
            except FedpeftError:
                stands = False
            if not stands:
                yield damage(
                    "run",
                    f"{adapter} is of no finished round: do not use it; the next start writes it "
                    "anew",
                )
        folder = self._directory / "rounds"
        others = {each.name for each in folder.iterdir()} if folder.is_dir() else set[str]()
        half = [name for name in others if name.startswith(".")]
        if half:
            yield sound("run", "a round that was being written; the next start makes it anew")
        for name in sorted(others - {str(number) for number in rounds} - set(half)):
            yield damage(
                "run",
                f"{folder / name} follows a gap, so that it does not count: restore the round that "
                "is missing from a backup, or remove it",
            )


def _weights(adapter: Path) -> str:
    path = adapter / WEIGHTS_FILE
    with explained("read", path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
