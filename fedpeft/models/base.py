"""Load the frozen base model, in full precision or as 4-bit NF4.

At no time are there two copies of it: weights go from the mapped file to the
device one tensor at a time, quantised on the way (Dettmers et al. 2023,
arXiv:2305.14314). Those of a GGUF file are dequantised first, to 32 bits in memory.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from fedpeft.config import Quantization
from fedpeft.errors import ModelError
from fedpeft.gguf_format.reading import weights_in
from fedpeft.models.configuration import configuration
from fedpeft.models.fingerprint import fingerprint
from fedpeft.models.gguf_tokenizer import load_gguf_tokenizer
from fedpeft.models.source import NOT_A_MODEL, require_complete
from fedpeft.weight_files import is_gguf


@dataclass(frozen=True, eq=False)
class BaseModel:
    """A frozen base model in memory, with its tokenizer and identity."""

    network: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    directory: Path
    fingerprint: str
    quantization: Quantization


def load_base(
    directory: Path, *, quantization: Quantization, dtype: torch.dtype, device: torch.device
) -> BaseModel:
    """Load ``directory`` onto ``device`` with every weight frozen.

    ``dtype`` is that of computation and of the weights that are not quantised.

    Raises:
        ModelError: the directory is incomplete or not a causal language model.
    """
    require_complete(directory)
    transformers_logging.disable_progress_bar()
    options: dict[str, Any] = {}
    if quantization == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    try:
        kind, where, weights = _source(directory)
        loaded = kind.from_pretrained(
            where,
            **weights,
            dtype=dtype,
            device_map={"": device},
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    except (*NOT_A_MODEL, SafetensorError, RuntimeError) as error:
        raise ModelError(
            f"the base model in {directory} cannot be loaded ({type(error).__name__}); "
            "check that it is a complete causal language model for transformers"
        ) from error
    network, info = cast("tuple[PreTrainedModel, dict[str, set[str]]]", loaded)
    _require_all_weights(info["missing_keys"], directory)
    if quantization == "nf4":
        # Imported here: most clinics compute without bitsandbytes, which takes its time to load.
        from fedpeft.models.four_bit import correct_on_cpu

        correct_on_cpu(network)
    network.requires_grad_(False)
    network.config.use_cache = False
    return BaseModel(
        network, load_tokenizer(directory), directory, fingerprint(directory), quantization
    )


def _source(base: Path) -> tuple[Any, Path | None, dict[str, Any]]:
    """Return the class that loads the model, where from, and what is given to it in memory."""
    if not is_gguf(base):
        return AutoModelForCausalLM, base, {}
    config = configuration(base)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    weights = weights_in(base, empty.state_dict())
    return type(empty), None, {"config": config, "state_dict": weights}


def _require_all_weights(missing: set[str], directory: Path) -> None:
    # transformers would fill them with random values, other ones on every machine.
    if missing:
        raise ModelError(
            f"the weights in {directory} lack {len(missing)} tensors of the model that config.json "
            f"describes, such as {min(missing)}; copy the whole model directory again"
        )


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer alone.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    require_complete(directory)
    if is_gguf(directory):
        return load_gguf_tokenizer(directory)
    try:
        return cast(
            "PreTrainedTokenizerBase",
            AutoTokenizer.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False
            ),
        )
    except Exception as error:  # the tokenizers library raises nothing more exact
        raise ModelError(
            f"the tokenizer in {directory} cannot be read ({type(error).__name__}); "
            "copy the whole model directory again"
        ) from error
