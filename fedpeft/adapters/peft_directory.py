"""Adapters as stock PEFT directories, loadable with nothing of ours.

``adapter_config.json`` and ``adapter_model.safetensors``, and beside them
``fedpeft.json`` with the base model's fingerprint, which other tools ignore.
The same adapter gives the same bytes.
"""

import json
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import ValidationError
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
_BEYOND_PLAIN_LORA = (
    "alora_invocation_tokens",
    "alpha_pattern",
    "exclude_modules",
    "layer_replication",
    "layers_to_transform",
    "lora_bias",
    "modules_to_save",
    "rank_pattern",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
    "use_rslora",
)
_CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways to begin (``init_lora_weights``) that change the base model along with the adapter."""
_BASE_FILE = "fedpeft.json"
_ADVICE = "name a directory written by fedpeft or by PEFT's save_pretrained"


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
    base = {"schema": 1, "base_fingerprint": state.schema.fingerprint}
    write_atomically(directory / CONFIG_FILE, _json_bytes(config))
    write_atomically(directory / _BASE_FILE, _json_bytes(base))
    write_atomically(directory / WEIGHTS_FILE, weights_bytes(state))


def weights_bytes(state: AdapterState) -> bytes:
    """Return the safetensors file that :func:`save_adapter` writes."""
    tensors = {name: tensor.contiguous() for name, tensor in state.tensors().items()}
    return save(tensors, {"format": "pt"})


def _json_bytes(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def _listed(target: str | set[str]) -> str | list[str]:
    return target if isinstance(target, str) else sorted(target)


def load_settings_of(directory: Path) -> AdapterSettings:
    """Read rank, alpha, dropout and target modules of a stock PEFT directory.

    Raises:
        AdapterError: there is no adapter, or it is of a kind other than plain LoRA.
    """
    path = directory / CONFIG_FILE
    config = _read_config(path)
    _require_plain_lora(config, path)
    target = config.get("target_modules")
    if isinstance(target, str) and target != "all-linear":
        raise AdapterError(
            f"{path} names its target modules by the pattern {target!r}; export the adapter with a "
            "list of module names"
        )
    try:
        return AdapterSettings.model_validate(
            {
                "rank": config.get("r"),
                "alpha": config.get("lora_alpha"),
                "dropout": config.get("lora_dropout", 0.0),
                "target_modules": target,
            }
        )
    except ValidationError as error:
        where = error.errors()[0]["loc"][0]
        raise AdapterError(
            f"{path} has no usable {where}; name a directory written by fedpeft or by PEFT's "
            "save_pretrained"
        ) from None


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise TypeError  # put into words below
    except (OSError, ValueError, TypeError) as error:
        raise AdapterError(
            f"{path.parent} holds no readable {path.name} ({type(error).__name__}); {_ADVICE}"
        ) from None
    return cast("dict[str, Any]", config)


def _require_plain_lora(config: dict[str, Any], path: Path) -> None:
    start = str(config.get("init_lora_weights", True))
    beyond = [key for key in _BEYOND_PLAIN_LORA if config.get(key)]
    beyond += ["init_lora_weights"] if start.startswith(_CHANGES_THE_BASE) else []
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or beyond:
        what = ", ".join(beyond) or f"type {config.get('peft_type')}, bias {config.get('bias')}"
        raise AdapterError(
            f"{path} is not a plain LoRA adapter ({what}); such adapters are refused"
        )


def load_adapter(directory: Path, schema: AdapterSchema) -> AdapterState:
    """Read the values of a stock PEFT directory under an agreed schema.

    Raises:
        AdapterError: the weights are missing or unreadable.
        SchemaMismatch: tensors, shapes or (where it is recorded) the base model differ.
    """
    fingerprint = recorded_base(directory)
    if fingerprint is not None and fingerprint != schema.fingerprint:
        raise SchemaMismatch(
            f"the adapter in {directory} belongs to base model {fingerprint[:12]}, not to "
            f"{schema.fingerprint[:12]}; use it with the base model that it was trained on"
        )
    return AdapterState.from_tensors(read_tensors(directory / WEIGHTS_FILE, _ADVICE), schema)


def recorded_base(directory: Path) -> str | None:
    """Return the fingerprint that was recorded; None in a directory that others wrote.

    Raises:
        AdapterError: what was recorded cannot be read.
    """
    path = directory / _BASE_FILE
    if not path.exists():
        return None
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["base_fingerprint"])
    except (OSError, ValueError, KeyError, TypeError):
        raise AdapterError(
            f"{path} is damaged, so it is unknown which base model the adapter belongs to; restore "
            "it from another copy of the adapter"
        ) from None


def read_tensors(path: Path, advice: str) -> dict[str, torch.Tensor]:
    """Return the tensors of a safetensors file by name; ``advice`` ends the sentence of an error.

    Raises:
        AdapterError: the file cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = cast("list[str]", file.keys())
            return {name: cast("torch.Tensor", file.get_tensor(name)) for name in names}
    except (OSError, SafetensorError) as error:
        raise AdapterError(
            f"{path} cannot be read as adapter weights ({type(error).__name__}); {advice}"
        ) from None
