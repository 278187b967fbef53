"""Plant canaries in a copy of a clinic's training file, and hold some real patients out.

Whether a canary is planted and whether a patient is held out are independent
fair coins; that is what one-run auditing rests on. The original is not changed,
and nothing is printed but counts. Must not know models.
"""

import json
import math
import random
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedpeft.audit.keyfile import (
    SCHEMA,
    AuditKey,
    Canary,
    HeldUnit,
    Source,
    Unit,
    digest,
    write_key,
)
from fedpeft.data import Record, RecordSet, Turn, read_records
from fedpeft.errors import ConfigError, DataError, StorageError
from fedpeft.storage import explained, write_once

REPETITIONS = (1, 4, 16)
DIGITS = 8
_LEAST_DIGITS, _MOST_DIGITS = 4, 32
_ONSETS = tuple("bdfgklmnprstvz")
_VOWELS = tuple("aeiou")
_QUESTION = "Which number is on the badge of {name}?"
_SENTENCE = "{name} has a badge with the number"
_DATA_MODE = 0o600


@dataclass(frozen=True, kw_only=True)
class Planting:
    """How much to plant.

    ``canaries`` are drawn for each of ``repetitions``, and about half of them are
    planted. ``share`` (0 to 1) of the real patients get a coin, and about half of
    these are held out. A secret has ``digits`` decimal digits.
    """

    canaries: int = 32
    repetitions: tuple[int, ...] = REPETITIONS
    share: float = 0.2
    digits: int = DIGITS

    def __post_init__(self) -> None:
        if self.canaries < 1 or not self.repetitions or min(self.repetitions) < 1:
            raise ConfigError(
                f"an audit needs canaries and repetitions of 1 or more, not {self.canaries} and "
                f"{list(self.repetitions)}; leave both out for the defaults"
            )
        if not _LEAST_DIGITS <= self.digits <= _MOST_DIGITS:
            raise ConfigError(
                f"a secret of {self.digits} digits is of no use; take {_LEAST_DIGITS} to "
                f"{_MOST_DIGITS}"
            )
        if not 0 <= self.share <= 1:
            raise ConfigError(f"the share of patients is {self.share}; take 0 to 1")


@dataclass(frozen=True, slots=True)
class Planted:
    """What was written: rows in all, planted rows and canaries, held out rows and patients."""

    rows: int
    planted_rows: int
    planted: int
    canaries: int
    held_rows: int
    held: int
    unit: Unit

    def describe(self) -> str:
        """Say it in one line, without a name or a number that is secret."""
        return (
            f"{self.rows} rows, {self.planted_rows} of them of {self.planted} canaries (of "
            f"{self.canaries} drawn); {self.held_rows} rows of {self.held} {self.unit}s held out"
        )


def plant(
    data: Path,
    out: Path,
    key: Path,
    planting: Planting | None = None,
    *,
    layout: str | None = None,
    skip_bad_rows: bool = False,
    draw: random.Random | None = None,
) -> Planted:
    """Write the training file with canaries to ``out`` and the audit key to ``key``.

    Args:
        data: records of any layout that fedpeft reads.
        out: a new ``.jsonl`` file, in the layout ``messages`` or ``text``.
        key: a new file; both are readable by their owner only.
        planting: how much; None: the defaults.
        layout: see :func:`fedpeft.data.read_records`, as ``skip_bad_rows``.
        draw: for tests and simulations; None: the system's secure randomness.

    Raises:
        ConfigError: ``out`` has another extension.
        DataError: the records cannot be read.
        StorageError: a file exists already, or cannot be written.
    """
    planting = planting or Planting()
    draw = draw or secrets.SystemRandom()
    _require_new(out, key)
    sha256 = digest(data)
    records = read_records(data, format=layout, skip_bad_rows=skip_bad_rows)
    source = Source(file=data.resolve(), sha256=sha256, format=layout, skip_bad_rows=skip_bad_rows)
    drawn = _draw_key(records, source, planting, draw)
    gone = {row for each in drawn.held if not each.member for row in each.rows}
    rows = [_row(record) for record in records.records if record.row not in gone]
    copies = list(_canary_rows(drawn, records, draw))
    rows += copies
    draw.shuffle(rows)
    write_key(drawn, key)
    _write_rows(rows, out)
    return Planted(
        rows=len(rows),
        planted_rows=len(copies),
        planted=sum(canary.included for canary in drawn.canaries),
        canaries=len(drawn.canaries),
        held_rows=len(gone),
        held=sum(not each.member for each in drawn.held),
        unit=drawn.unit,
    )


def secret(digits: int, draw: random.Random) -> str:
    """Return ``digits`` random decimal digits; the first may be 0."""
    return f"{draw.randrange(10**digits):0{digits}}"


def record_of(prompt: str, code: str, *, conversation: bool, row: int) -> Record:
    """Return a canary's record, as it is trained on and as it is scored."""
    if not conversation:
        return Record((), row, None, None, f"{prompt} {code}")
    return Record((Turn("user", prompt), Turn("assistant", code)), row, None, None)


def _require_new(out: Path, key: Path) -> None:
    if out.suffix.lower() != ".jsonl":
        raise ConfigError(f"the file with canaries is written as JSON lines; name {out} .jsonl")
    for path in (out, key):
        if path.exists():
            raise StorageError(f"{path} exists, and nothing is written over; name a new file")


def _draw_key(
    records: RecordSet, source: Source, planting: Planting, draw: random.Random
) -> AuditKey:
    """Toss all coins, and write down how they fell."""
    conversation = records.records[0].text is None
    return AuditKey.model_validate(
        {
            "schema": SCHEMA,
            "source": source,
            "conversation": conversation,
            "unit": "record" if records.patients is None else "patient",
            "seed": f"{draw.getrandbits(256):064x}",
            "canaries": tuple(_canaries(planting, conversation, draw)),
            "held": _held(records, planting.share, draw),
        }
    )


def _write_rows(rows: Sequence[dict[str, object]], out: Path) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with explained("write", out):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_once(out, text.encode(), mode=_DATA_MODE)


def _canaries(planting: Planting, conversation: bool, draw: random.Random) -> Iterator[Canary]:
    frame = _QUESTION if conversation else _SENTENCE
    names: set[str] = set()
    for repetitions in planting.repetitions:
        for _ in range(planting.canaries):
            while (name := f"{_word(draw)} {_word(draw)}") in names:
                pass
            names.add(name)
            yield Canary(
                repetitions=repetitions,
                included=draw.random() < 1 / 2,
                prompt=frame.format(name=name),
                secret=secret(planting.digits, draw),
            )


def _word(draw: random.Random) -> str:
    syllables = (draw.choice(_ONSETS) + draw.choice(_VOWELS) for _ in range(3))
    return "".join(syllables).capitalize()


def _held(records: RecordSet, share: float, draw: random.Random) -> tuple[HeldUnit, ...]:
    """Draw the real units to attack, and for each of them whether it is trained on."""
    rows: dict[str | int, list[int]] = {}
    for record in records.records:
        rows.setdefault(record.patient_id or record.row, []).append(record.row)
    chosen = draw.sample(list(rows.values()), math.floor(share * len(rows)))
    held = tuple(HeldUnit(rows=tuple(each), member=draw.random() < 1 / 2) for each in chosen)
    if sum(len(each.rows) for each in held if not each.member) == len(records):
        raise DataError(
            f"{records.file} has too few records: all of them would be held out; "
            "hold out a smaller share"
        )
    return held


def _canary_rows(
    key: AuditKey, records: RecordSet, draw: random.Random
) -> Iterator[dict[str, object]]:
    """Copies of the planted canaries; those of one belong to one patient, if patients are named."""
    taken = {record.patient_id for record in records.records}
    for canary in key.canaries:
        if not canary.included:
            continue
        while (patient := f"audit-{draw.getrandbits(48):012x}") in taken:
            pass
        taken.add(patient)
        record = record_of(canary.prompt, canary.secret, conversation=key.conversation, row=0)
        row = _row(record)
        if records.patients is not None:
            row["patient_id"] = patient
        for _ in range(canary.repetitions):
            yield row


def _row(record: Record) -> dict[str, object]:
    row: dict[str, object] = {}
    if record.patient_id is not None:
        row["patient_id"] = record.patient_id
    if record.label is not None:
        row["label"] = record.label
    if record.text is not None:
        row["text"] = record.text
    else:
        row["messages"] = [{"role": turn.role, "content": turn.text} for turn in record.turns]
    return row
