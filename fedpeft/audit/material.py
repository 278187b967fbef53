"""What an audit scores: canaries beside other secrets, and real records by coin.

Reads the original data files that the keys name, and writes nothing.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedpeft.audit.keyfile import AuditKey, Canary, digest
from fedpeft.audit.planting import record_of, secret
from fedpeft.data import EncodedExample, Record, RecordSet, encode, read_records
from fedpeft.errors import ConfigError, DataError
from fedpeft.models import AdaptedModel, context_length

_DEFAULT_LENGTH = 2048


@dataclass(frozen=True, slots=True, repr=False)
class Target:
    """A canary and the rows that are scored for it: its own, then those with other secrets."""

    canary: Canary
    examples: list[EncodedExample]


@dataclass(frozen=True, slots=True, repr=False)
class Held:
    """A real record, which patient (counted through all keys) it is of, and whether it was seen."""

    example: EncodedExample
    unit: int
    member: bool


@dataclass(frozen=True, slots=True, repr=False)
class Material:
    """Everything that is scored, of all keys."""

    targets: list[Target]
    held: list[Held]


def gather(
    keys: dict[Path, AuditKey], model: AdaptedModel, *, samples: int, max_length: int | None
) -> Material:
    """Encode all canaries, each with ``samples`` other secrets in its place, and the real records.

    Raises:
        ConfigError: canaries do not fit into ``max_length`` tokens (None: the model's context).
        DataError: a data file is not the one that its key was made for.
    """
    length = max_length or context_length(model.base.directory) or _DEFAULT_LENGTH
    targets: list[Target] = []
    held: list[Held] = []
    units = 0
    for path, key in keys.items():
        targets += _targets(key, path, model, samples, length)
        held += _held(key, path, model, length, units)
        units += len(key.held)
    return Material(targets, held)


def _targets(
    key: AuditKey, path: Path, model: AdaptedModel, samples: int, length: int
) -> list[Target]:
    records: list[Record] = []
    for number, canary in enumerate(key.canaries):
        codes = [canary.secret, *_other_secrets(key.seed, number, canary, samples)]
        records += [
            record_of(canary.prompt, code, conversation=key.conversation, row=number)
            for code in codes
        ]
    encoded = _encode(records, path, model, length)
    if any(example.truncated for example in encoded):
        raise ConfigError(
            f"the canaries of {path} do not fit into {length} tokens; name a larger --max-length"
        )
    size = 1 + samples
    groups = [encoded[at : at + size] for at in range(0, len(encoded), size)]
    if not key.conversation:
        prompts = _encode(
            [Record((), 0, None, None, canary.prompt) for canary in key.canaries],
            path,
            model,
            length,
        )
        groups = [
            [_only_the_end(row, prompt) for row in group]
            for group, prompt in zip(groups, prompts, strict=True)
        ]
    return [Target(canary, group) for canary, group in zip(key.canaries, groups, strict=True)]


def _other_secrets(seed: str, number: int, canary: Canary, samples: int) -> list[str]:
    """Return distinct secrets of the canary's form, without its own."""
    digits = len(canary.secret)
    if samples >= 10**digits:
        raise ConfigError(
            f"there are only {10**digits - 1} other secrets of {digits} digits; take fewer samples"
        )
    # The key is secret, and what is drawn here protects nothing.
    draw = random.Random(f"{seed}/{number}")  # noqa: S311
    found: dict[str, None] = {}
    while len(found) < samples:
        code = secret(digits, draw)
        if code != canary.secret:
            found[code] = None
    return list(found)


def _only_the_end(row: EncodedExample, prompt: EncodedExample) -> EncodedExample:
    """Make only those tokens of a plain text targets that come after the prompt."""
    shared = min(len(row), len(prompt))
    differs = np.flatnonzero(row.input_ids[:shared] != prompt.input_ids[:shared])
    start = int(differs[0]) if len(differs) else shared
    targets = row.targets.copy()
    targets[:start] = False
    return EncodedExample(row.input_ids, targets, row.row, row.truncated, row.patient_id)


def _encode(
    records: Sequence[Record], path: Path, model: AdaptedModel, length: int
) -> list[EncodedExample]:
    if not records:
        return []
    made_up = RecordSet(tuple(records), "canaries", path, {}, None, "row", "canaries")
    return list(encode(made_up, model.base.tokenizer, max_length=length).examples)


def _held(
    key: AuditKey, path: Path, model: AdaptedModel, length: int, first_unit: int
) -> list[Held]:
    if not key.held:
        return []
    source = key.source
    if digest(source.file) != source.sha256:
        raise DataError(
            f"{source.file} is not the file that {path} was made for: its content has changed; "
            "restore it, or plant and train again"
        )
    records = read_records(source.file, format=source.format, skip_bad_rows=source.skip_bad_rows)
    encoded = encode(records, model.base.tokenizer, max_length=length).examples
    by_row = {example.row: example for example in encoded}
    missing = {row for unit in key.held for row in unit.rows} - set(by_row)
    if missing:
        raise DataError(
            f"the audit key {path} names rows that {source.file} does not have; take the key that "
            "was written with it"
        )
    return [
        Held(by_row[row], first_unit + number, unit.member)
        for number, unit in enumerate(key.held)
        for row in unit.rows
    ]
