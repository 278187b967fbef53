"""Whether an audit log is whole: nothing changed, missing, reordered or cut off.

*What it finds.* An entry that was edited, taken out, added or moved; a missing file; the
end cut off, against the file ``end`` beside the log and against an end that was kept
elsewhere; a checkpoint that the keeper of the log did not sign.

*What it cannot find.* Whoever may write the files can cut the log off after any checkpoint,
or rewrite what follows the last one, if they make ``end`` fit; they can put back an older
copy of the whole folder, or remove all of it. Against that only an end that was kept
elsewhere helps (``audit-log verify`` prints it), or the other side's log. Whoever holds the
private identity can write the whole log anew.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from fedpeft.audit_log.checkpoint import signing_key
from fedpeft.audit_log.entry import Entry, Written
from fedpeft.audit_log.segments import Line, all_lines, read_end, segment_numbers
from fedpeft.errors import AuditLogDamaged
from fedpeft.privacy.ledger_chain import START, Anchor
from fedpeft.sealing.identity import PublicIdentity

CANNOT_FIND: Final = (
    "not found by this: entries cut off after a checkpoint by somebody who may write these files "
    "and made the file 'end' fit, an older copy of the whole folder, and a log that was removed "
    "and begun anew; keep the end printed here elsewhere, and give it to verify with --kept"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What verifying found.

    ``problems`` are sentences, none if the log is whole. ``signed`` is the number of the
    last entry that a checkpoint of the keeper covers, 0 if none does; ``torn`` counts bytes
    of a last line that a power cut left, which the next start cuts away.
    """

    problems: tuple[str, ...]
    entries: int
    files: int
    end: Anchor
    signed: int
    torn: int


def verify(
    directory: Path,
    *,
    identity: PublicIdentity | None = None,
    earlier: Iterable[PublicIdentity] = (),
    kept: Anchor | None = None,
) -> Verdict:
    """Check the log in ``directory``.

    Args:
        directory: of the log.
        identity: of its keeper; None: checkpoints may be signed by anybody.
        earlier: those that it took the place of.
        kept: an end that was kept elsewhere.

    Raises:
        StorageError: a file cannot be read.
    """
    numbers = segment_numbers(directory)
    problems = [
        f"the file {number:06d}.jsonl is missing"
        for number in range(1, (numbers or [0])[-1] + 1)
        if number not in numbers
    ]
    ends = [("an end that was kept elsewhere", kept)] if kept else []
    try:
        noted = read_end(directory)
    except AuditLogDamaged as error:
        problems.append(str(error))
    else:
        if noted is not None:
            ends.insert(0, ("the file 'end'", noted))
        elif numbers:
            problems.append("the file 'end' is missing, so entries may be missing at the end")
    return check_lines(
        all_lines(directory),
        ends,
        identity=identity,
        earlier=earlier,
        problems=problems,
        files=len(numbers),
    )


def check_lines(
    lines: Iterable[Line],
    ends: Iterable[tuple[str, Anchor]],
    *,
    identity: PublicIdentity | None,
    earlier: Iterable[PublicIdentity] = (),
    problems: Iterable[str] = (),
    files: int = 1,
) -> Verdict:
    """Check ``lines`` in their order against ``ends``: what names an end, and that end."""
    ends, keys = tuple(ends), {one.signing_bytes.hex() for one in earlier}
    walk = _Walk(wanted={place.seq: "" for _, place in ends}, earlier=keys)
    found = [*problems, *(problem for line in lines for problem in walk.take(line))]
    found += [text for name, place in ends if (text := walk.end_problem(name, place))]
    found += walk.signature_problems(identity)
    return Verdict(
        problems=tuple(found),
        entries=walk.count,
        files=files,
        end=walk.last,
        signed=walk.signed(identity),
        torn=walk.torn,
    )


@dataclass
class _Walk:
    """What was seen of a log so far; ``wanted`` collects the hashes of some entries."""

    wanted: dict[int, str]
    earlier: set[str]
    last: Anchor = START
    lost: bool = False
    count: int = 0
    torn: int = 0
    checkpoints: list[tuple[int, str | None]] = field(default_factory=list[tuple[int, str | None]])
    handed_over: list[tuple[int, str]] = field(default_factory=list[tuple[int, str]])
    needs_signature: bool = False

    def take(self, line: Line) -> Iterator[str]:
        """Go on with the next line, and yield what is wrong with it."""
        if self.torn:
            yield f"{line.where} follows a line without an end: it was changed"
            self.torn = 0
        if line.is_torn:
            self.torn = len(line.data)
            return
        written = line.read()
        if written is None:
            yield f"{line.where} is no entry: it was changed, or is of another release"
            self.lost = True
            return
        yield from self._placed(line, written)
        self._note(written.entry)
        self.last = Anchor(written.entry.seq, written.hash)
        self.count += 1
        if written.entry.seq in self.wanted:
            self.wanted[written.entry.seq] = written.hash

    def _placed(self, line: Line, written: Written) -> Iterator[str]:
        entry, due = written.entry, self.last.seq + 1
        # After a line that is no entry, only the number can be compared.
        due += self.lost
        if entry.seq > due:
            yield f"{entry.seq - due} entries are missing before {line.where} (entry {entry.seq})"
        elif entry.seq < due or (entry.previous != self.last.hash and not self.lost):
            yield (
                f"{line.where} (entry {entry.seq}) does not follow entry {self.last.seq}: entries "
                "were reordered, replaced or added"
            )
        if not written.is_unchanged:
            yield f"{line.where} (entry {entry.seq}) was changed"
        self.lost = False

    def _note(self, entry: Entry) -> None:
        # A new box or site has noted keys before its program first ran, and signed.
        self.needs_signature |= entry.kind not in ("key", "repair")
        if entry.kind == "checkpoint":
            self.checkpoints.append((entry.seq, signing_key(entry)))
        elif entry.kind == "key" and isinstance(entry.about.get("key_before"), str):
            self.handed_over.append((entry.seq, str(entry.about["key_before"])))

    def end_problem(self, name: str, place: Anchor) -> str:
        """Return what is wrong with the end that ``name`` names; "" if nothing."""
        if place.seq > self.last.seq:
            return (
                f"the last entries are missing: the log ends with entry {self.last.seq}, and "
                f"{name} names entry {place.seq}"
            )
        if self.wanted.get(place.seq) != place.hash:
            return f"entry {place.seq} is not the one that {name} names"
        return ""

    def signature_problems(self, identity: PublicIdentity | None) -> Iterator[str]:
        """Yield a sentence for each checkpoint that is not the keeper's."""
        trusted = self._trusted(identity)
        for seq, key in self.checkpoints:
            if key is None:
                yield f"the checkpoint in entry {seq} is not signed by the key that it names"
            elif not trusted(seq, key):
                yield f"the checkpoint in entry {seq} was not signed by the keeper of this log"
        if identity is not None and self.needs_signature and not self.signed(identity):
            yield "nothing in this log is signed by its keeper: somebody else may have written it"

    def signed(self, identity: PublicIdentity | None) -> int:
        """Return the last entry that a good checkpoint covers."""
        trusted = self._trusted(identity)
        good = [seq for seq, key in self.checkpoints if key and trusted(seq, key)]
        return max(good, default=1) - 1

    def _trusted(self, identity: PublicIdentity | None) -> Callable[[int, str], bool]:
        """Return who may have signed the checkpoint in an entry: the keeper at that time.

        A key that it had before counts only where the present one has signed later: the old
        one may be in other hands by now, and would vouch for what was added at the end.
        """
        if identity is None:
            return lambda _seq, _key: True
        own = identity.signing_bytes.hex()
        vouched = max((seq for seq, key in self.checkpoints if key == own), default=0)
        handed = {key for seq, key in self.handed_over if seq < vouched}

        def trusted(seq: int, key: str) -> bool:
            return key == own or key in self.earlier or (key in handed and seq < vouched)

        return trusted
