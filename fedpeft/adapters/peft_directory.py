"""Adapters as stock PEFT directories, loadable with nothing of ours.

``adapter_config.json`` and ``adapter_model.safetensors``; the base model's
fingerprint travels in the safetensors metadata, which other tools ignore.
"""

import json
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from fedpeft.adapters.lora import lora_config
from fedpeft.adapters.schema import AdapterSchema
from fedpeft.adapters.state import AdapterState
from fedpeft.config import AdapterSettings
from fedpeft.errors import AdapterError, SchemaMismatch
from fedpeft.storage import write_atomically

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_BEYOND_PLAIN_LORA = ("use_dora", "use_rslora", "modules_to_save", "rank_pattern", "alpha_pattern")
_FINGERPRINT_KEY = "fedpeft.base_fingerprint"


def save_adapter(
    state: AdapterState, settings: AdapterSettings, directory: Path, *, base_name: str
) -> None:
    """Write the adapter; each file is replaced atomically, the weights last.

    Raises:
        StorageError: the directory cannot be written.
    """
    config = cast("dict[str, Any]", lora_config(settings, base_name).to_dict())
    config["target_modules"] = _listed(config["target_modules"])
    config["inference_mode"] = True
    metadata = {"format": "pt", _FINGERPRINT_KEY: state.schema.fingerprint}
    tensors = {name: tensor.contiguous() for name, tensor in state.tensors().items()}
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    write_atomically(directory / CONFIG_FILE, text.encode())
    write_atomically(directory / WEIGHTS_FILE, save(tensors, metadata))


def _listed(target: str | set[str]) -> str | list[str]:
    return target if isinstance(target, str) else sorted(target)


def load_settings_of(directory: Path) -> AdapterSettings:
    """Read rank, alpha, dropout and target modules of a stock PEFT directory.

    Raises:
        AdapterError: there is no adapter, or it is of a kind other than plain LoRA.
    """
    path = directory / CONFIG_FILE
    try:
        config = cast("dict[str, Any]", json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise AdapterError(
            f"{directory} holds no readable {CONFIG_FILE} ({type(error).__name__}); "
            "name a directory written by fedpeft or by PEFT's save_pretrained"
        ) from None
    unsupported = [key for key in _BEYOND_PLAIN_LORA if config.get(key)]
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or unsupported:
        what = (
            ", ".join(unsupported) or f"type {config.get('peft_type')}, bias {config.get('bias')}"
        )
        raise AdapterError(
            f"{path} is not a plain LoRA adapter ({what}); such adapters are refused"
        )
    target = cast("str | list[str]", config["target_modules"])
    if isinstance(target, str) and target != "all-linear":
        raise AdapterError(
            f"{path} names its target modules by the pattern {target!r}; export the adapter with a "
            "list of module names"
        )
    return AdapterSettings(
        rank=config["r"],
        alpha=config["lora_alpha"],
        dropout=config.get("lora_dropout", 0.0),
        target_modules="all-linear" if isinstance(target, str) else tuple(target),
    )


def load_adapter(directory: Path, schema: AdapterSchema) -> AdapterState:
    """Read the values of a stock PEFT directory under an agreed schema.

    Raises:
        AdapterError: the weights are missing or unreadable.
        SchemaMismatch: tensors, shapes or (where it is recorded) the base model differ.
    """
    tensors, fingerprint = _read_weights(directory / WEIGHTS_FILE)
    if fingerprint is not None and fingerprint != schema.fingerprint:
        raise SchemaMismatch(
            f"the adapter in {directory} belongs to base model {fingerprint[:12]}, not to "
            f"{schema.fingerprint[:12]}; use it with the base model that it was trained on"
        )
    return AdapterState.from_tensors(tensors, schema)


def _read_weights(path: Path) -> tuple[dict[str, torch.Tensor], str | None]:
    try:
        with safe_open(path, framework="pt") as file:
            names = cast("list[str]", file.keys())
            tensors = {name: cast("torch.Tensor", file.get_tensor(name)) for name in names}
            metadata = cast("dict[str, str] | None", file.metadata())
    except (OSError, SafetensorError) as error:
        raise AdapterError(
            f"{path} cannot be read as adapter weights ({type(error).__name__}); "
            "name a directory written by fedpeft or by PEFT's save_pretrained"
        ) from None
    return tensors, (metadata or {}).get(_FINGERPRINT_KEY)
