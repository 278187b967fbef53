"""LoRA put on a network, and an adapter's schema from the base model's configuration alone.

The central site needs the schema and must never load a base model, so the network is
built on torch's meta device: shapes without storage.
"""

import warnings
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils.error import NoMatchingPeftModuleError
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedpeft.adapters import AdapterSchema, at_rank, lora_config, schema_of
from fedpeft.config import AdapterSettings
from fedpeft.errors import AdapterError, ModelError
from fedpeft.models.configuration import configuration
from fedpeft.models.fingerprint import fingerprint
from fedpeft.models.source import NOT_A_MODEL, require_complete

_LINEAR = (torch.nn.Linear, Conv1D)
OWN = "default"
"""PEFT's name of the adapter that can be trained."""
REST = "rest"
"""PEFT's name of the one beside it, which cannot."""


def adapter_schema(directory: Path, settings: AdapterSettings) -> AdapterSchema:
    """Describe the adapter of ``settings`` on the base model in ``directory``.

    Raises:
        ModelError: the directory is not a causal language model.
        AdapterError: no module of the model matches ``target_modules``.
    """
    require_complete(directory)
    try:
        config = configuration(directory)
        with torch.device("meta"):
            network = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except NOT_A_MODEL as error:
        raise ModelError(
            f"{directory} does not describe a causal language model in its config.json or header "
            f"({type(error).__name__}); copy the base model again"
        ) from error
    with torch.device("meta"):
        adapted = attach_lora(network, settings)
    return schema_of(lora_tensors(adapted), fingerprint(directory), "float32")


def lora_tensors(adapted: PeftModel) -> dict[str, torch.Tensor]:
    """Return the factors of the adapter that can be trained, by their names in a saved one."""
    # Said aloud: the default adds the embeddings where the head has an adapter.
    return get_peft_model_state_dict(adapted, adapter_name=OWN, save_embedding_layers=False)


def attach_lora(
    network: PreTrainedModel, settings: AdapterSettings, *, rest_rank: int = 0
) -> PeftModel:
    """Wrap ``network`` with a fresh LoRA adapter (PEFT; ``network`` itself is changed).

    With ``rest_rank`` a second adapter of that rank is active beside the first, at the
    same scale alpha/rank and without dropout, as nothing in it is trained.

    Raises:
        AdapterError: one of ``target_modules`` matches no linear module of the model.
    """
    _require_targets(network, settings)
    try:
        with warnings.catch_warnings():
            # peft 0.21 reads an attribute that transformers 5.23 calls deprecated.
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
            # Of a head that shares the embeddings' weights: nothing is merged into those here.
            warnings.filterwarnings("ignore", ".*tie_word_embeddings.*", UserWarning)
            adapted = cast("PeftModel", get_peft_model(network, lora_config(settings)))
            if rest_rank:
                _attach_rest(adapted, settings, rest_rank)
            return adapted
    except NoMatchingPeftModuleError:
        raise AdapterError(
            "the base model has no linear module that an adapter could be put on; use another one"
        ) from None


def _require_targets(network: PreTrainedModel, settings: AdapterSettings) -> None:
    """Check every name; PEFT is content if one matches, and would drop a misspelt one silently."""
    if isinstance(settings.target_modules, str):
        return
    linear = [name for name, part in network.named_modules() if isinstance(part, _LINEAR)]
    unknown = [
        target
        for target in settings.target_modules
        if not any(f".{name}".endswith(f".{target}") for name in linear)
    ]
    if unknown or not settings.target_modules:
        known = sorted({name.rsplit(".", 1)[-1] for name in linear})
        raise AdapterError(
            f"adapter.target_modules names {', '.join(map(repr, unknown)) or 'nothing'}, which "
            f"matches no module of the base model; its linear modules are {', '.join(known)} "
            '(or use "all-linear")'
        )


def _attach_rest(adapted: PeftModel, settings: AdapterSettings, rank: int) -> None:
    rest = at_rank(settings, rank).model_copy(update={"dropout": 0.0})
    adapted.add_adapter(REST, lora_config(rest))
    tuner = cast("Any", adapted.base_model)
    tuner.set_adapter([OWN, REST])
    tuner.set_requires_grad(REST, requires_grad=False)
