"""The base model with the adapter added to its weights, in float32, ready to be written.

One copy of the model is in memory: the adapted model is asked before its adapter is
added, and what it said is kept to compare exports with.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedpeft.errors import ModelError
from fedpeft.models import AdaptedModel, BaseModel, load_base
from fedpeft.models.base_change import BaseChange
from fedpeft_client.export.probes import Expectation, expect
from fedpeft_client.export.source import Source


@dataclass(frozen=True, kw_only=True, eq=False)
class Merged:
    """A network of float32 weights on the CPU, and what it is expected to say."""

    network: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    expected: list[Expectation]

    @property
    def bytes(self) -> int:
        """What all weights take up."""
        own = {id(weight): weight for weight in self.network.parameters()}
        return sum(weight.numel() * weight.element_size() for weight in own.values())

    @property
    def embeddings(self) -> int:
        """How many tokens the model can read."""
        return self.network.get_input_embeddings().get_parameter("weight").shape[0]


def merge(source: Source) -> Merged:
    """Load the base model in full precision and add the adapter to it.

    A base model in a ``.gguf`` file is dequantised. float32 whatever the files hold: in
    16 bits most of what a small adapter adds would be rounded away.

    Raises:
        ModelError: the base model cannot be loaded, or its weights are of 4 or 8 bits.
    """
    _require_full_precision(source.base)
    base = load_base(
        source.base, quantization="none", dtype=torch.float32, device=torch.device("cpu")
    )
    adapted = AdaptedModel(base, source.settings)
    adapted.load(source.state)
    expected = expect(base.network, base.tokenizer)
    base = adapted.detach()
    BaseChange(base).extend([(source.digest, source.state)], source.scale)
    _describe(base)
    return Merged(network=base.network, tokenizer=base.tokenizer, expected=expected)


def _require_full_precision(base: Path) -> None:
    if not base.is_dir():
        return
    config = cast("dict[str, Any]", json.loads((base / "config.json").read_text("utf-8")))
    if config.get("quantization_config"):
        raise ModelError(
            f"the weights in {base} are quantised already (quantization_config in config.json), "
            "and merging happens in full precision from the full-precision base model; name that "
            "one, or export with --format peft or gguf-lora"
        )


def _describe(base: BaseModel) -> None:
    """Make the configuration that is saved true of the merged network."""
    network = base.network
    # load_base switches it off for training; whoever generates text with the export wants it.
    network.config.use_cache = True
    head = cast("torch.nn.Module | None", network.get_output_embeddings())
    embeddings = network.get_input_embeddings()
    if head is not None and head.get_parameter("weight") is not embeddings.get_parameter("weight"):
        network.config.tie_word_embeddings = False
