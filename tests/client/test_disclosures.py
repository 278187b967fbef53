"""What left a box in words, compared with the ledger, and as a page to print."""

import re
from collections.abc import Iterable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fedpeft.audit_log import AuditLog, Choice, Entry, Value, all_lines, entries_in, verify
from fedpeft_client.reports.disclosures import (
    JOINING,
    REASON_WORDS,
    WORDS,
    Charged,
    Report,
    report_lines,
    report_of,
    size_text,
)
from fedpeft_client.reports.disclosures_page import Heading, page

HEADING = Heading(
    clinic="northfield", federation="heart", server="ab12", period="2026 to now", made="today"
)
NOTHING = Charged(rounds=frozenset(), steps=0, lines=())


class Diary:
    """A log whose days the test chooses."""

    def __init__(self, directory: Path) -> None:
        self.directory, self._day = directory, "2026-01-01"
        self._log = AuditLog(directory, clock=lambda: f"{self._day}T10:00:00.000+00:00")

    def on(self, day: str) -> "Diary":
        self._day = day
        return self

    def sent(self, purpose: str, mode: str, size: int = 1000, **more: Value) -> "Diary":
        about: dict[str, Value] = {"type": purpose, "mode": mode, "bytes": size, "run": "7"}
        self._log.append("message-out", {**about, "round": 1, **more})
        return self

    def accepted(self, number: int = 1, run: str = "7") -> "Diary":
        self._log.append(
            "decision", {"run": run, "round": number, "verdict": "accepted", "rule": "policy"}
        )
        return self

    def charged(self, number: int = 1, **about: Value) -> "Diary":
        self._log.append("charge", {"run": "7", "round": number, "unit": "patient", **about})
        return self

    def noted(self, kind: str, **about: Value) -> "Diary":
        self._log.append(kind, about)  # type: ignore[arg-type]
        return self

    def entries(self, choice: Choice = Choice()) -> list[Entry]:  # noqa: B008  (frozen)
        return list(entries_in(all_lines(self.directory), choice))

    def report(self, charged: Charged | None = NOTHING) -> Report:
        entries = self.entries()
        return report_of(entries, entries, verify(self.directory), charged)

    def text(self, charged: Charged | None = NOTHING) -> str:
        return "\n".join(report_lines(self.report(charged)))


@pytest.fixture
def diary(tmp_path: Path) -> Diary:
    return Diary(tmp_path / "audit")


def ledger(*rounds: tuple[str, int], steps: int = 0) -> Charged:
    return Charged(rounds=frozenset(rounds), steps=steps, lines=(("spent", "epsilon 1.5"),))


def doubts(diary: Diary, charged: Charged | None) -> tuple[str, ...]:
    return diary.report(charged).doubts


# What may be missing


def test_a_damaged_log_is_said_first(diary: Diary):
    diary.sent("train", "sealed").sent("train", "sealed")
    path = diary.directory / "000001.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"bytes":1000', b'"bytes":1', 1))
    first = report_lines(diary.report())[0]
    assert first.startswith("doubt\tthe audit log is damaged: 000001.jsonl, line 1")


def test_a_ledger_that_cannot_be_read_is_said(diary: Diary):
    (text,) = doubts(diary.accepted(), None)
    assert "was not compared" in text


@pytest.mark.parametrize("rounds", [[("7", 2)], [("8", 1)], [("7", 1), ("7", 2)]])
def test_a_round_that_the_ledger_charged_and_the_log_does_not_know_is_said(
    diary: Diary, rounds: Iterable[tuple[str, int]]
):
    (text,) = doubts(diary.accepted(1), ledger(*rounds))
    assert "of which this audit log knows nothing" in text


def test_a_round_that_the_ledger_does_not_know_is_said(diary: Diary):
    diary.accepted(1).charged(1, mechanism="none")
    assert "has not charged" in doubts(diary, NOTHING)[0]
    assert doubts(diary, ledger(("7", 1))) == ()


def test_a_ledger_with_fewer_steps_than_were_noted_is_said(diary: Diary):
    diary.accepted(1).charged(1, mechanism="local", steps=20, epsilon=1.0, delta=1e-5)
    assert "knows of 20 charged steps" in doubts(diary, ledger(("7", 1), steps=10))[0]
    assert doubts(diary, ledger(("7", 1), steps=20)) == ()


def test_an_accepted_round_that_was_never_charged_is_no_doubt(diary: Diary):
    assert doubts(diary.accepted(1), NOTHING) == ()


# What left


@pytest.mark.parametrize(("kind", "mode"), WORDS)
def test_each_way_of_protection_has_its_words(diary: Diary, kind: str, mode: str):
    purpose = f"{kind}.masked" if mode == "secagg" else kind
    assert WORDS[kind, mode] in diary.sent(purpose, mode).text()
    assert ("single" in WORDS[kind, mode] or "sum" in WORDS[kind, mode]) == (mode == "secagg")


def test_a_reason_word_is_named(diary: Diary):
    diary.sent("train", "plain", 8, reason="bad-data").sent("train", "plain", 8, reason="bad-data")
    assert f"{REASON_WORDS}: bad-data (2)" in diary.text()


def test_a_message_of_an_unknown_kind_is_not_left_out(diary: Diary):
    diary.sent("query", "sealed", 5000)
    assert diary.report().bytes == 5000
    assert "does not know" in diary.text()


def test_days_and_runs_stand_apart_and_the_sum_is_of_all(diary: Diary):
    diary.sent("train", "sealed", 1000).sent("train", "sealed", 2000, run="8")
    diary.on("2026-01-02").sent("evaluate", "sealed", 500)
    report = diary.report()
    assert [(one.day, one.run) for one in report.disclosures] == [
        ("2026-01-01", "7"),
        ("2026-01-01", "8"),
        ("2026-01-02", "7"),
    ]
    assert report.bytes == 3500
    assert "all\t3.5 kB left in answers" in diary.text()


def test_what_it_cost_is_the_last_charge_of_the_day_rounded_up(diary: Diary):
    diary.charged(1, mechanism="local", steps=1, epsilon=1.0, delta=1e-5)
    diary.charged(2, mechanism="local", steps=2, epsilon=1.501, delta=1e-5)
    assert "each patient protected by local noise: epsilon 1.51 at delta 1e-05" in diary.text()


@pytest.mark.parametrize(
    ("mechanism", "words"),
    [
        ("none", "without differential privacy"),
        ("central", "counts only if that site is trusted"),
        ("distributed", "without a bound"),
    ],
)
def test_no_noise_and_no_bound_are_said(diary: Diary, mechanism: str, words: str):
    assert words in diary.charged(1, mechanism=mechanism, epsilon=None, delta=None).text()


def test_refusals_and_joining_are_named(diary: Diary):
    diary.noted("key", event="joining", name="northfield")
    diary.noted("decision", run="7", round=1, verdict="refused", rule="outside-hours")
    assert "outside-hours (1)" in diary.text()
    assert JOINING in diary.text()


def test_nothing_is_said_to_be_nothing(diary: Diary):
    assert "nothing in this time" in diary.text()


def test_sizes_are_in_units_of_1000():
    assert [size_text(size) for size in (999, 1000, 1_500_000)] == ["999 bytes", "1.0 kB", "1.5 MB"]


# The page


class Structure(HTMLParser):
    """Elements that close in order, their attributes, and the text."""

    VOID = frozenset({"meta"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)


def busy(diary: Diary) -> Report:
    diary.noted("key", event="joining", name="northfield")
    diary.accepted(1).sent("train.keys", "secagg", 300).sent("train.masked", "secagg", 9000)
    diary.charged(1, mechanism="local", steps=1, epsilon=1.0, delta=1e-5)
    diary.on("2026-01-02").sent("train", "plain", 8, reason="bad-data", round=2)
    return diary.report(ledger(("7", 1), steps=1))


def test_the_page_is_well_formed_and_says_what_the_report_says(diary: Diary):
    report = busy(diary)
    found = Structure(page(report, HEADING))
    assert found.open == []
    text = " ".join(found.words)
    assert "The list is complete." in text
    for words in ("northfield", "heart", "ab12", WORDS["train", "secagg"], JOINING, "bad-data"):
        assert words in text
    assert "9.3 kB" in text
    assert report.end in text
    assert found.seen.count("table") == 1
    assert found.seen.count("tr") == 1 + 1 + 2 + 1  # heading, joining, two days, all


def test_the_page_loads_and_runs_nothing(diary: Diary):
    text = page(busy(diary), HEADING)
    found = Structure(text)
    assert not {"script", "img", "link", "iframe", "object", "svg", "form", "a"} & set(found.seen)
    assert not {"src", "href", "onload", "onclick"} & {name for name, _ in found.attributes}
    assert "url(" not in text
    assert "@import" not in text
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in found.attributes
    assert "@media print" in text


def test_a_damaged_log_stands_on_the_page_in_a_box_of_its_own(diary: Diary):
    diary.sent("train", "sealed")
    (diary.directory / "end").unlink()
    text = page(diary.report(), HEADING)
    assert "The list may not be complete." in text
    assert "The list is complete." not in text
    assert 'class="verdict bad"' in text


def test_nothing_can_break_out_of_the_page(diary: Diary):
    evil = "<script>alert(1)</script>"
    diary.sent(evil, "sealed", run=evil).sent("train", "plain", reason=evil)
    diary.noted("decision", run="7", verdict="refused", rule='"><img/src=x>')
    heading = Heading(clinic=evil, federation=evil, server=evil, period=evil, made=evil)
    charged = Charged(rounds=frozenset({(evil, 1)}), steps=0, lines=((evil, evil),))
    text = page(diary.report(charged), heading)
    found = Structure(text)
    assert found.open == []
    assert not {"script", "img"} & set(found.seen)
    assert len(re.findall("&lt;script&gt;", text)) >= 8
