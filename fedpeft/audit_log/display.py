"""An audit log for people and programs: which entries are shown, and in what words."""

import datetime
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from fedpeft.audit_log.entry import Entry, Value
from fedpeft.audit_log.segments import Line
from fedpeft.audit_log.verification import CANNOT_FIND, Verdict
from fedpeft.errors import ConfigError
from fedpeft.privacy.ledger_chain import Anchor

_DAY: Final = len("2026-01-31")
_SHOWN_DIGITS: Final = 12
_LONG: Final = {"sha256", "identity", "before", "signer", "lineage", "weights"}
_LEFT_OUT: Final = {"key", "signature", "key_before"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Which entries are wanted; None: all. Days are in UTC, and both are meant too."""

    since: datetime.date | None = None
    until: datetime.date | None = None
    run: str | None = None
    kind: str | None = None

    def takes(self, entry: Entry) -> bool:
        """Return whether an entry is wanted."""
        day = datetime.date.fromisoformat(entry.time[:_DAY])
        return (
            (self.since is None or day >= self.since)
            and (self.until is None or day <= self.until)
            and self.run in (None, entry.about.get("run"))
            and self.kind in (None, entry.kind)
        )


def day_of(text: str | None, option: str) -> datetime.date | None:
    """Read a day that was typed.

    Raises:
        ConfigError: it is none.
    """
    try:
        return None if text is None else datetime.date.fromisoformat(text)
    except ValueError:
        raise ConfigError(f"{option} {text!r} is no day; write it as 2026-01-31") from None


def end_of(text: str | None, option: str) -> Anchor | None:
    """Read an end that was kept elsewhere, as :func:`verdict_lines` prints it.

    Raises:
        ConfigError: it is none.
    """
    if text is None:
        return None
    number, _, digest = text.partition(":")
    if not number.isdecimal() or len(digest) != len("00" * 32):
        raise ConfigError(
            f"{option} {text!r} is no end of an audit log; write it as audit-log verify printed "
            "it: the number of the last entry, a colon and 64 hexadecimal digits"
        )
    return Anchor(int(number), digest)


def entries_in(lines: Iterable[Line], choice: Choice) -> Iterator[Entry]:
    """Yield the entries that are wanted; what cannot be read is left out."""
    for line in lines:
        written = line.read()
        if written is not None and choice.takes(written.entry):
            yield written.entry


def entry_text(entry: Entry) -> str:
    """Return an entry in one line: number, time, kind, what it says."""
    about = " ".join(
        f"{name}={_short(name, value)}"
        for name, value in entry.about.items()
        if name not in _LEFT_OUT and value is not None
    )
    return f"{entry.seq}\t{entry.time}\t{entry.kind}\t{about}"


def entry_json(entry: Entry) -> str:
    """Return an entry as the JSON object that stands in the log."""
    return json.dumps(json.loads(entry.to_line()))


def verdict_lines(verdict: Verdict) -> list[str]:
    """Return what verifying found, a line each: subject, tab, text."""
    lines = [f"problem\t{problem}" for problem in verdict.problems]
    lines.append(f"entries\t{verdict.entries} in {verdict.files} files")
    lines.append(f"end\t{verdict.end.seq}:{verdict.end.hash}")
    after = verdict.end.seq - verdict.signed
    lines.append(
        f"signed\tup to entry {verdict.signed}; the {after} after it are covered by the chain alone"
    )
    if verdict.torn:
        lines.append(
            f"torn\t{verdict.torn} bytes of a last line were not written to their end, as after a "
            "power cut; the next start cuts them away"
        )
    return [*lines, f"limits\t{CANNOT_FIND}"]


def _short(name: str, value: Value) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text[:_SHOWN_DIGITS] if name in _LONG and len(text) == len("00" * 32) else text
