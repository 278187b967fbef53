"""What left this box, per day and run, in words for a privacy officer.

Made from the audit log, and compared with the privacy ledger: each says when the other is
incomplete. No record and no path is in it. Must not know how it is shown.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from fedpeft.audit_log import Entry, Verdict
from fedpeft.data.records import count

_DAY: Final = len("2026-01-31")
_TRAIN, _EVALUATE = "train", "evaluate"
WORDS: Final[Mapping[tuple[str, str], str]] = {
    (_TRAIN, "secagg"): (
        "results of training, masked: the central site can open only the sum over the clinics of "
        "the round, three at the least; of this clinic alone it reads, where there is noise, what "
        "that has cost"
    ),
    (_TRAIN, "sealed"): (
        "results of training, encrypted on the way: the central site opens this clinic's update "
        "by itself"
    ),
    (_EVALUATE, "secagg"): (
        "how well the model answers on this clinic's records, masked: the central site can open "
        "only the sum over the clinics of the round; of this clinic alone it reads the largest "
        "rank that it trains"
    ),
    (_EVALUATE, "sealed"): (
        "how well the model answers on this clinic's records, encrypted on the way: the central "
        "site reads this clinic's figures by itself"
    ),
}
"""What a message holds and who can read it, by what was asked and the way of protection."""
REASON_WORDS: Final = "a reason word in place of an answer, readable for the central site"
OTHER: Final = "a message of a kind that this release does not know"
JOINING: Final = (
    "asked to join the federation: the public keys of this box, a signature and the token of the "
    "invitation (by stick a proof of it), readable for the central site"
)
NOT_LISTED: Final = (
    "While it is connected, the box also sends questions for messages and signs of life, without "
    "any content of the clinic; they are not listed one by one. With each answer goes how long it "
    "took."
)


@dataclass(slots=True)
class Sent:
    """Messages of one kind under one protection; ``words`` counts the reasons among them."""

    messages: int = 0
    bytes: int = 0
    rounds: set[int] = field(default_factory=set[int])
    words: Counter[str] = field(default_factory=Counter[str])

    def add(self, entry: Entry) -> None:
        """Count one more."""
        self.messages += 1
        self.bytes += _number(entry, "bytes")
        if isinstance(number := entry.about.get("round"), int):
            self.rounds.add(number)
        if isinstance(word := entry.about.get("reason"), str):
            self.words[word] += 1


@dataclass(slots=True)
class Disclosure:
    """What left on one day in one run, by what it says of itself (see ``WORDS``).

    ``spent`` is the last charge of the day; its epsilon is over all rounds of this
    federation until then. ``refused`` counts the rules by which jobs were refused.
    """

    day: str
    run: str
    sent: dict[str, Sent] = field(default_factory=dict[str, Sent])
    received: Sent = field(default_factory=Sent)
    refused: Counter[str] = field(default_factory=Counter[str])
    spent: Entry | None = None

    @property
    def bytes(self) -> int:
        """All that left, in bytes."""
        return sum(one.bytes for one in self.sent.values())

    @property
    def messages(self) -> int:
        """How many messages left."""
        return sum(one.messages for one in self.sent.values())

    def take(self, entry: Entry) -> None:
        """Count an entry of this day and run."""
        match entry.kind:
            case "message-out":
                self.sent.setdefault(_words_of(entry), Sent()).add(entry)
            case "message-in":
                self.received.add(entry)
            case "decision" if entry.about.get("verdict") == "refused":
                self.refused[str(entry.about.get("rule"))] += 1
            case "charge":
                self.spent = entry
            case _:
                pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Charged:
    """What the privacy ledger says: rounds as (run, round) of this federation, steps, and lines
    for people, each a subject and a text."""

    rounds: frozenset[tuple[str, int]]
    steps: int
    lines: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What left a box; ``doubts`` are sentences on why it may not be all, none if it is all.

    ``joined`` are the times at which the box joined. ``entries`` and ``end`` are of the log.
    """

    disclosures: tuple[Disclosure, ...]
    joined: tuple[str, ...]
    doubts: tuple[str, ...]
    ledger: tuple[tuple[str, str], ...]
    end: str

    @property
    def bytes(self) -> int:
        """All that left, in bytes."""
        return sum(one.bytes for one in self.disclosures)


def report_of(
    all_entries: Iterable[Entry],
    wanted: Iterable[Entry],
    verdict: Verdict,
    charged: Charged | None,
    *,
    locked: bool = False,
) -> Report:
    """Return what left.

    Args:
        all_entries: of the log, to compare with the ledger.
        wanted: those among them that are to be shown.
        verdict: what verifying the log found.
        charged: what the ledger says; None if it cannot be read.
        locked: the identity of the box is, so that ``verdict`` says nothing of signatures.
    """
    found: dict[tuple[str, str], Disclosure] = {}
    joined: list[str] = []
    for entry in wanted:
        if entry.kind == "key" and entry.about.get("event") == "joining":
            joined.append(entry.time)
        if isinstance(run := entry.about.get("run"), str):
            key = (entry.time[:_DAY], run)
            found.setdefault(key, Disclosure(*key)).take(entry)
    doubts = [f"the audit log is damaged: {problem}" for problem in verdict.problems]
    if locked:
        doubts.append(
            "the identity of this box is locked, so who signed the audit log was not checked: "
            "fedpeft-client audit-log verify asks for the passphrase"
        )
    doubts += _against_ledger(all_entries, charged)
    return Report(
        disclosures=tuple(found[key] for key in sorted(found)),
        joined=tuple(joined),
        doubts=tuple(doubts),
        ledger=charged.lines if charged else (),
        end=f"{verdict.end.seq}:{verdict.end.hash}",
    )


def _against_ledger(entries: Iterable[Entry], charged: Charged | None) -> Iterable[str]:
    """Yield a sentence for each difference between the log and the ledger."""
    if charged is None:
        yield "the privacy ledger is damaged or cannot be read, so the log was not compared with it"
        return
    accepted, trained, steps = set[tuple[str, int]](), set[tuple[str, int]](), 0
    for entry in entries:
        place = (str(entry.about.get("run")), _number(entry, "round"))
        if entry.kind == "decision" and entry.about.get("verdict") == "accepted":
            accepted.add(place)
        elif entry.kind == "charge":
            trained.add(place)
            steps = max(steps, _number(entry, "steps"))
    for run, number in sorted(charged.rounds - accepted):
        yield (
            f"the privacy ledger has charged round {number} of run {run}, of which this audit log "
            "knows nothing: it began later, entries are missing, or another box uses the ledger"
        )
    for run, number in sorted(trained - charged.rounds):
        yield (
            f"this box has trained in round {number} of run {run}, which the privacy ledger has "
            "not charged: the ledger was replaced by an older or another one"
        )
    if steps > charged.steps:
        yield (
            f"the audit log knows of {steps} charged steps and the privacy ledger of "
            f"{charged.steps}: the ledger was replaced by an older or another one"
        )


def report_lines(report: Report) -> list[str]:
    """Return the report for people, a line each: subject, tab, text."""
    lines = [f"doubt\t{doubt}" for doubt in report.doubts]
    lines += [f"{time[:_DAY]}\t{JOINING}" for time in report.joined]
    for one in report.disclosures:
        head = f"{one.day}\trun {one.run}"
        lines.append(f"{head}: {count(one.messages, 'message')} left, {size_text(one.bytes)}")
        lines += [f"\t{sent_text(words, sent)}" for words, sent in sorted(one.sent.items())]
        lines += [f"\t{text}" for text in facts_of(one)]
    if not report.disclosures:
        lines.append("sent\tnothing in this time")
    lines.append(f"all\t{size_text(report.bytes)} left in answers")
    lines += [f"{subject}\t{text}" for subject, text in report.ledger]
    lines.append(f"end\tof the audit log: {report.end}")
    return lines


def sent_text(words: str, sent: Sent) -> str:
    """Return what messages of one kind were, in one sentence."""
    text = (
        f"{count(sent.messages, 'message')}, {size_text(sent.bytes)}, {_rounds_text(sent)}{words}"
    )
    named = ", ".join(f"{word} ({times})" for word, times in sorted(sent.words.items()))
    return f"{text}: {named}" if named else text


def facts_of(one: Disclosure) -> list[str]:
    """Return what else a day in a run brought, a sentence each."""
    facts = [f"{count(one.received.messages, 'message')} came, {size_text(one.received.bytes)}"]
    if one.refused:
        rules = ", ".join(f"{rule} ({times})" for rule, times in sorted(one.refused.items()))
        facts.append(f"not answered as asked, and the central site was told the reason: {rules}")
    if one.spent is not None:
        facts.append(_spent_text(one.spent))
    return facts


def size_text(size: int) -> str:
    """Return bytes for people, in units of 1000."""
    if size < 1000:
        return f"{size} bytes"
    return f"{size / 1000:,.1f} kB" if size < 10**6 else f"{size / 1e6:,.1f} MB"


def _spent_text(entry: Entry) -> str:
    about = entry.about
    if about.get("mechanism") == "none":
        return "trained without differential privacy: nothing bounds what the results tell"
    epsilon, delta = about.get("epsilon"), about.get("delta")
    who = f"each {about.get('unit')} protected by {about.get('mechanism')} noise"
    if about.get("mechanism") == "central":
        return f"{who}, which the central site adds: it counts only if that site is trusted"
    if not isinstance(epsilon, float | int) or not isinstance(delta, float):
        return f"{who}, without a bound over all rounds of this federation until then"
    # Rounded up, so that it never looks smaller than it is.
    shown = f"{math.ceil(epsilon * 100) / 100:.2f}"
    return (
        f"{who}: epsilon {shown} at delta {delta:g} over all rounds of this federation until then"
    )


def _words_of(entry: Entry) -> str:
    if entry.about.get("mode") == "plain":
        return REASON_WORDS
    kind = str(entry.about.get("type")).partition(".")[0]
    return WORDS.get((kind, str(entry.about.get("mode"))), OTHER)


def _rounds_text(sent: Sent) -> str:
    rounds = sorted(sent.rounds)
    if not rounds:
        return ""
    if rounds == list(range(rounds[0], rounds[-1] + 1)) and len(rounds) > 1:
        return f"rounds {rounds[0]} to {rounds[-1]}: "
    return f"round {', '.join(map(str, rounds))}: "


def _number(entry: Entry, name: str) -> int:
    value = entry.about.get(name)
    return value if isinstance(value, int) else 0
