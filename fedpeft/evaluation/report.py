"""Evaluate a model directory and an adapter directory on a file of records."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fedpeft.adapters import AdapterState, load_adapter, load_settings_of
from fedpeft.config import AdapterSettings, ModelSettings
from fedpeft.data import EncodedSet, encode, read_records
from fedpeft.errors import ConfigError
from fedpeft.evaluation.scoring import Score, score
from fedpeft.models import AdaptedModel, Workbench, context_length, resolve_base

_DEFAULT_LENGTH = 2048


def evaluate_files(
    settings: ModelSettings,
    data: Path,
    *,
    adapter: Path | None,
    layout: str | None,
    max_length: int | None,
    skip_bad_rows: bool,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Return the report of ``fedpeft evaluate``; ``say`` is told what was read.

    Raises:
        ConfigError: ``max_length`` is beyond the model's context.
        FedpeftError: model, adapter or data cannot be used.
    """
    model = adapted_from(Workbench(), settings, adapter, relative_to=Path())
    context = context_length(model.base.directory)
    length = max_length or context or _DEFAULT_LENGTH
    if context is not None and length > context:
        raise ConfigError(
            f"--max-length {length} is more than the {context} tokens that the model in "
            f"{model.base.directory} can read; use {context} or less"
        )
    records = read_records(data, format=layout, skip_bad_rows=skip_bad_rows)
    say(records.describe())
    encoded = encode(records, model.base.tokenizer, max_length=length)
    say(encoded.describe())
    return report(score(model, encoded.examples), encoded)


def report(found: Score, encoded: EncodedSet) -> dict[str, Any]:
    """Return a score as the JSON object of ``fedpeft evaluate`` (schema 1)."""
    return {
        "schema": 1,
        "rows": found.rows,
        "tokens": found.tokens,
        "loss": found.loss,
        "perplexity": found.perplexity,
        "exact_match": found.exact_match,
        "truncated": encoded.truncated,
    }


def adapted_from(
    workbench: Workbench, settings: ModelSettings, adapter: Path | None, *, relative_to: Path
) -> AdaptedModel:
    """Load the base model, with the adapter in a directory or with one that changes nothing.

    Raises:
        ModelError, AdapterError: base model or adapter cannot be used, or do not belong together.
    """
    directory = resolve_base(settings.base, relative_to=relative_to)
    lora = AdapterSettings(rank=1) if adapter is None else load_settings_of(adapter)
    model = workbench.adapted(
        directory, lora, quantization=settings.quantization, dtype=settings.dtype
    )
    if adapter is None:
        # B = 0, so BA adds nothing: this is the base model.
        model.load(AdapterState(model.schema, torch.zeros(model.schema.numel)))
    else:
        model.load(load_adapter(adapter, model.schema))
    return model
