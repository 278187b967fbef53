"""The adapted model as a transformers directory: float32 safetensors, tokenizer, template."""

from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel

from fedpeft_client.export.companions import copy_licence, copy_tokenizer
from fedpeft_client.export.folder import require_space
from fedpeft_client.export.merging import merge
from fedpeft_client.export.probes import answers_of, compare
from fedpeft_client.export.record import Check, Written
from fedpeft_client.export.source import Source


def write(source: Source, folder: Path, say: Callable[[str], None]) -> Written:
    """Write the adapted model into ``folder``, and compare it with the adapter beside the base.

    Raises:
        ModelError: the base model cannot be loaded, or is quantised.
        ExportDiffers: what was written answers otherwise.
        StorageError, OSError: the disk is full, or the folder cannot be written.
    """
    return Written(checks=(write_model(source, folder, say),), details={"dtype": "float32"})


def write_model(
    source: Source, folder: Path, say: Callable[[str], None], *, also_needed: float = 0.0
) -> Check:
    """Do what :func:`write` does; ``also_needed`` of the model's bytes must be free beside it."""
    say("loading the base model in full precision and adding the adapter to it")
    merged = merge(source)
    require_space(folder, int(merged.bytes * (1 + also_needed)), "the merged model")
    say(f"writing {merged.bytes >> 20} MiB of weights")
    try:
        merged.network.save_pretrained(folder)
    except SafetensorError as error:
        raise OSError(str(error)) from None  # as of other writers, which have no number either
    copy_tokenizer(source.base, merged.tokenizer, merged.embeddings, folder)
    copy_licence(source.base, folder)
    expected = merged.expected
    del merged  # one copy in memory at a time
    say("comparing what was written with the adapted model")
    return compare("the merged model as transformers loads it", answers_of(_load(folder)), expected)


def _load(folder: Path) -> PreTrainedModel:
    return cast(
        "PreTrainedModel",
        AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False
        ),
    )
