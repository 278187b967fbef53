"""What a clinic's file holds once it is read: turns, records, and a set of them.

Must not know files, layouts, tokenizers or models. Nothing here shows record
text or a patient id when it is printed, logged or put into a traceback.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

Role: TypeAlias = Literal["system", "user", "assistant"]
Unit: TypeAlias = Literal["line", "row"]


@dataclass(frozen=True, slots=True, repr=False)
class Turn:
    """One message of a conversation, exactly as the file has it."""

    role: Role
    text: str

    def __repr__(self) -> str:
        return f"Turn(role={self.role!r}, characters={len(self.text)})"


@dataclass(frozen=True, slots=True, repr=False)
class Record:
    """One usable row: either a conversation or plain text, never both.

    A conversation has ``turns``, the last of them by the assistant, and
    ``text`` is None. Plain text has no turns, and ``text`` holds it.

    ``row`` says where the record stands, counted from 1 in the unit of its
    :class:`RecordSet`: the line that an editor shows, or the row number.
    ``patient_id`` marks the records that belong to one patient.
    """

    turns: tuple[Turn, ...]
    row: int
    patient_id: str | None
    label: str | None
    text: str | None = None

    def __repr__(self) -> str:
        form = f"turns={len(self.turns)}" if self.text is None else "plain text"
        return f"Record(row={self.row}, {form})"


@dataclass(frozen=True, slots=True, repr=False)
class RecordSet:
    """The usable records of one file, in file order.

    ``skipped`` counts the rows left out, by reason. ``patients`` is the number
    of distinct patient ids, or None where the file has no ``patient_id``: a
    file has one on every row or on none.
    """

    records: tuple[Record, ...]
    format: str
    file: Path
    skipped: Mapping[str, int]
    patients: int | None
    unit: Unit
    layout: str
    """The format in words, for :meth:`describe`."""

    def __len__(self) -> int:
        return len(self.records)

    def __repr__(self) -> str:
        return f"RecordSet({self.describe()!r})"

    def place(self, row: int) -> str:
        """Name a place for an error message, such as ``clinic/train.csv line 17``."""
        return f"{self.file} {self.unit} {row}"

    def describe(self) -> str:
        """Say in one line what was read: no record text, no patient ids."""
        parts = [count(len(self.records), "row"), self.layout]
        if self.patients is not None:
            parts.append(count(self.patients, "patient"))
        line = f"{Path(*self.file.parts[-2:])}: {', '.join(parts)}"
        if self.skipped:
            line += (
                f"; skipped {count(sum(self.skipped.values()), 'row')} ({reasons(self.skipped)})"
            )
        return line


def count(number: int, noun: str) -> str:
    """Return ``1 row`` or ``2 rows``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def reasons(skipped: Mapping[str, int]) -> str:
    """Return ``3 with no answer, 1 with an empty text``, the most frequent reason first."""
    ordered = sorted(skipped.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{number} with {reason}" for reason, number in ordered)
