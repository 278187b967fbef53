"""Writes the demo's synthetic federation: four clinics, four file layouts, facts of their own.

Each clinic has a handbook on eight invented drugs that no other clinic uses.
Its patients' records ask about the handbook in everyday wordings, or are round
notes. The held-out files ask every fact again in wordings that no training file
contains, so that only a model that has learnt the fact, not the sentence, gets
them right. It must not know the base model, the training recipe or the engine.
"""

import csv
import io
import itertools
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
from pyarrow import parquet

from fedpeft.demo import language
from fedpeft.storage import write_atomically

_Item = TypeVar("_Item")

DEFAULT_SEED = 11
DRUGS_PER_CLINIC = 8
HELDOUT_WORDINGS = 2
NOTE_SHARE = 0.2
VALID_SHARE = 1 / 8
RECORDS_PER_PATIENT = (4, 8)


@dataclass(frozen=True)
class DemoClinic:
    """One clinic of the written federation, with the paths of its files."""

    name: str
    specialty: str
    train: Path
    valid: Path
    heldout: Path
    train_rows: int


@dataclass(frozen=True)
class _Record:
    """One question and its answer in a patient's file; ``context`` may be empty."""

    patient_id: str
    context: str
    question: str
    answer: str

    @property
    def prompt(self) -> str:
        return f"{self.context} {self.question}" if self.context else self.question


@dataclass(frozen=True)
class _Layout:
    """How a clinic stores its records."""

    extension: str
    encode: Callable[[list[_Record]], bytes]


def _chat_jsonl(records: list[_Record]) -> bytes:
    rows = (
        {
            "patient_id": record.patient_id,
            "messages": [
                {"role": "user", "content": record.prompt},
                {"role": "assistant", "content": record.answer},
            ],
        }
        for record in records
    )
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _question_csv(records: list[_Record]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\r\n")
    writer.writerow(("patient_id", "question", "answer"))
    writer.writerows((record.patient_id, record.prompt, record.answer) for record in records)
    return text.getvalue().encode()


def _alpaca_json(records: list[_Record]) -> bytes:
    rows = [
        {
            "patient_id": record.patient_id,
            "instruction": record.question,
            "input": record.context,
            "output": record.answer,
        }
        for record in records
    ]
    return (json.dumps(rows, indent=1) + "\n").encode()


def _prompt_parquet(records: list[_Record]) -> bytes:
    table = pa.table(
        {
            "patient_id": pa.array([record.patient_id for record in records], pa.string()),
            "prompt": pa.array([record.prompt for record in records], pa.string()),
            "completion": pa.array([record.answer for record in records], pa.string()),
        }
    )
    sink = io.BytesIO()
    parquet.write_table(table, sink, compression="zstd")
    return sink.getvalue()


@dataclass(frozen=True)
class _Plan:
    """What is fixed about a clinic, whatever the seed."""

    name: str
    specialty: str
    train_rows: int
    layout: _Layout


_PLANS = (
    _Plan("northfield", "cardiology", 1200, _Layout("jsonl", _chat_jsonl)),
    _Plan("harbour", "neurology", 720, _Layout("csv", _question_csv)),
    _Plan("lindenpark", "paediatrics", 480, _Layout("json", _alpaca_json)),
    _Plan("riverside", "oncology", 240, _Layout("parquet", _prompt_parquet)),
)
_OLDEST_CHILD = 17
_OLDEST_ADULT = 94


class _Registry:
    """A clinic's handbook and its patients, who are numbered across all splits."""

    def __init__(self, plan: _Plan, handbook: dict[str, dict[str, str]], seed: str) -> None:
        self._plan = plan
        self._handbook = handbook
        self._rng = random.Random(seed)  # noqa: S311  (synthetic data, nothing secret)
        self._patients = itertools.count(1)

    def care(self, rows: int) -> list[_Record]:
        """Training or validation records: handbook questions and round notes."""
        decks = {drug: self._question_deck(drug) for drug in self._handbook}
        records: list[_Record] = []
        for drug in itertools.cycle(self._handbook):
            patient, age = self._next_patient()
            for _ in range(self._rng.randint(*RECORDS_PER_PATIENT)):
                if len(records) == rows:
                    return records
                if self._rng.random() < NOTE_SHARE:
                    records.append(self._note(patient, age, drug))
                else:
                    question, answer = next(decks[drug])
                    context = self._rng.choice(language.OPENERS).format(age=age)
                    records.append(_Record(patient, context, question, answer))
        raise AssertionError("a clinic has at least one drug")

    def exam(self) -> list[_Record]:
        """Every fact of the handbook, asked in ``HELDOUT_WORDINGS`` unseen wordings."""
        records: list[_Record] = []
        for first, (drug, facts) in enumerate(self._handbook.items()):
            for turn in range(first, first + HELDOUT_WORDINGS):
                patient, age = self._next_patient()
                for number, attribute in enumerate(language.ATTRIBUTES):
                    wordings = attribute.paraphrases
                    wording = wordings[(number + turn) % len(wordings)]
                    context = self._rng.choice(language.PARAPHRASE_OPENERS).format(age=age)
                    question = wording.format(drug=drug)
                    records.append(_Record(patient, context, question, facts[attribute.key]))
        return records

    def _next_patient(self) -> tuple[str, int]:
        """A new patient's id and age in years."""
        oldest = _OLDEST_CHILD if self._plan.specialty == "paediatrics" else _OLDEST_ADULT
        youngest = 1 if self._plan.specialty == "paediatrics" else _OLDEST_CHILD + 1
        patient = f"{self._plan.name[:3].upper()}-{next(self._patients):05}"
        return patient, self._rng.randint(youngest, oldest)

    def _question_deck(self, drug: str) -> Iterator[tuple[str, str]]:
        """Endless questions on one drug, each fact equally often and its wordings in turn."""
        wordings = {
            a.key: itertools.cycle(self._shuffled(a.questions)) for a in language.ATTRIBUTES
        }
        while True:
            for attribute in self._shuffled(language.ATTRIBUTES):
                question = next(wordings[attribute.key]).format(drug=drug)
                yield question, self._handbook[drug][attribute.key]

    def _note(self, patient: str, age: int, drug: str) -> _Record:
        request = self._rng.choice(language.NOTE_REQUESTS).format(age=age, drug=drug)
        facts = self._handbook[drug]
        note = language.round_note(self._rng, specialty=self._plan.specialty, facts=facts)
        return _Record(patient, "", request, note)

    def _shuffled(self, items: tuple[_Item, ...]) -> list[_Item]:
        return self._rng.sample(items, k=len(items))


def write_federation(directory: Path, *, seed: int = DEFAULT_SEED) -> tuple[DemoClinic, ...]:
    """Write the files of all clinics below ``directory`` and say where they are.

    Every clinic gets a folder of its name with ``train``, ``valid`` and
    ``heldout`` in its own layout: chat messages as JSON lines, CSV, an Alpaca
    JSON array, or Parquet. The same seed gives the same bytes.

    Raises:
        StorageError: a file cannot be written.
    """
    handbooks = _handbooks(random.Random(seed))  # noqa: S311  (synthetic data, nothing secret)
    return tuple(
        _write_clinic(directory, plan, handbook, seed)
        for plan, handbook in zip(_PLANS, handbooks, strict=True)
    )


def _handbooks(rng: random.Random) -> list[dict[str, dict[str, str]]]:
    """One handbook a clinic: facts by attribute key, by drug name; no drug occurs twice."""
    names: list[str] = []
    while len(names) < DRUGS_PER_CLINIC * len(_PLANS):
        name = language.invented_name(rng, for_clinic=True)
        if name not in names:
            names.append(name)
    chunks = [names[first :: len(_PLANS)] for first in range(len(_PLANS))]
    return [{name: language.draw_facts(rng) for name in chunk} for chunk in chunks]


def _write_clinic(
    directory: Path, plan: _Plan, handbook: dict[str, dict[str, str]], seed: int
) -> DemoClinic:
    registry = _Registry(plan, handbook, f"{seed}/{plan.name}")
    splits = {
        "train": registry.care(plan.train_rows),
        "valid": registry.care(round(plan.train_rows * VALID_SHARE)),
        "heldout": registry.exam(),
    }
    folder = directory / plan.name
    paths = {split: folder / f"{split}.{plan.layout.extension}" for split in splits}
    for split, records in splits.items():
        write_atomically(paths[split], plan.layout.encode(records))
    return DemoClinic(
        name=plan.name,
        specialty=plan.specialty,
        train=paths["train"],
        valid=paths["valid"],
        heldout=paths["heldout"],
        train_rows=plan.train_rows,
    )
