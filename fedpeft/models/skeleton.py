"""An adapter's schema and first values from the base model's configuration alone.

The central site needs both and must never load a base model, so the network is
built on torch's meta device: shapes without storage.
"""

import math
import warnings
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils.error import NoMatchingPeftModuleError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedpeft.adapters import AdapterSchema, AdapterState, lora_config, schema_of
from fedpeft.config import AdapterSettings
from fedpeft.errors import AdapterError, ModelError
from fedpeft.models.fingerprint import fingerprint
from fedpeft.models.source import NOT_A_MODEL, require_complete

_LINEAR = (torch.nn.Linear, Conv1D)


def adapter_schema(directory: Path, settings: AdapterSettings) -> AdapterSchema:
    """Describe the adapter of ``settings`` on the base model in ``directory``.

    Raises:
        ModelError: the directory is not a causal language model.
        AdapterError: no module of the model matches ``target_modules``.
    """
    require_complete(directory)
    try:
        # Said aloud, for the default is to ask at the terminal whether to run the model's code.
        config = AutoConfig.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
        with torch.device("meta"):
            network = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except NOT_A_MODEL as error:
        raise ModelError(
            f"{directory}/config.json does not describe a causal language model "
            f"({type(error).__name__}); copy the whole model directory again"
        ) from error
    with torch.device("meta"):
        adapted = attach_lora(network, settings)
    tensors = get_peft_model_state_dict(adapted)
    return schema_of(tensors, fingerprint(directory), "float32")


def attach_lora(network: PreTrainedModel, settings: AdapterSettings) -> PeftModel:
    """Wrap ``network`` with a fresh LoRA adapter (PEFT; ``network`` itself is changed).

    Raises:
        AdapterError: one of ``target_modules`` matches no linear module of the model.
    """
    _require_targets(network, settings)
    try:
        with warnings.catch_warnings():
            # peft 0.21 reads an attribute that transformers 5.23 calls deprecated.
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
            return get_peft_model(network, lora_config(settings))  # pyright: ignore[reportReturnType]
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


def initial_state(schema: AdapterSchema, seed: int) -> AdapterState:
    """Return LoRA's start: A Kaiming-uniform (a = √5, as PEFT draws it), B zero, so BA = 0."""
    generator = torch.Generator().manual_seed(seed)
    state = AdapterState(schema, torch.zeros(schema.numel))
    for spec, tensor in zip(schema.tensors, state.tensors().values(), strict=True):
        if spec.factor == "A":
            torch.nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=generator)
    return state
