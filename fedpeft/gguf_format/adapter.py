"""Write a LoRA adapter in PEFT's format as a GGUF file that llama.cpp puts beside the base.

llama.cpp adds (adapter.lora.alpha / r) · B · A to a weight, so every other scale is put into
B. Knows nothing of training and of rounds: a lineage is a text that it carries.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np
from gguf import GGMLQuantizationType

from fedpeft.adapters.peft_directory import CONFIG_FILE, WEIGHTS_FILE, read_tensors, recorded_base
from fedpeft.errors import AdapterError, NotConvertible, SchemaMismatch
from fedpeft.gguf_format.architecture import Frame, frame_of
from fedpeft.gguf_format.header import FINGERPRINT, LINEAGE, read_header
from fedpeft.gguf_format.layout import Tensor, Value, write_gguf
from fedpeft.gguf_format.reading import frame_in
from fedpeft.gguf_format.source import load_config
from fedpeft.weight_files import fingerprint, is_gguf

if TYPE_CHECKING:
    import torch

    _Pair: TypeAlias = tuple[torch.Tensor, torch.Tensor]

_ADVICE = "name a directory written by fedpeft or by PEFT's save_pretrained"
_FACTOR = re.compile(r"base_model\.model\.(.+)\.lora_(A|B)(?:\.default)?\.weight")
_BEYOND = (
    "alora_invocation_tokens",
    "layer_replication",
    "lora_bias",
    "modules_to_save",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
)
"""Settings of PEFT that are more than a product of two factors beside a weight."""


@dataclass(frozen=True, kw_only=True)
class _Scale:
    """What PEFT multiplies BA by, module for module."""

    alpha: float
    alphas: Mapping[str, float]
    square_root: bool

    def of(self, module: str, rank: int) -> float:
        """Return the factor of ``module``, whose pair has ``rank``."""
        found = (
            value
            for pattern, value in self.alphas.items()
            if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", module)
        )
        alpha = next(found, self.alpha)
        return alpha / math.sqrt(rank) if self.square_root else alpha / rank


def write_adapter(adapter: Path, base: Path, path: Path, *, lineage: str | None = None) -> None:
    """Write the PEFT directory ``adapter`` of the base model ``base`` to ``path``.

    ``base`` is a model's directory or a GGUF file; the file names its fingerprint. The
    factors are in 32 bits, so nothing is lost. ``lineage`` is a text that is kept with it.

    Raises:
        AdapterError: the adapter is damaged.
        SchemaMismatch: it was trained on another base model.
        NotConvertible: it is more than plain LoRA on weights that llama.cpp knows.
        ModelError, StorageError: the base cannot be read, the file not be written.
    """
    scale = _scale(adapter)
    owner = _require_base(adapter, base)
    frame = _frame(base)
    pairs = _pairs(read_tensors(adapter / WEIGHTS_FILE, _ADVICE))
    metadata: dict[str, Value] = {
        "general.architecture": frame.name,
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": scale.alpha,
        FINGERPRINT: owner,
        **({} if lineage is None else {LINEAGE: lineage}),
    }
    tensors: list[Tensor] = []
    for module, (a, b) in sorted(pairs.items()):
        name = _place(module, frame)
        wanted, given = scale.of(module, a.shape[0]), scale.alpha / a.shape[0]
        rows = frame.in_gguf(name, b.float() * (wanted / given))
        tensors += [_tensor(f"{name}.lora_a", a), _tensor(f"{name}.lora_b", rows)]
    write_gguf(path, metadata, tensors)


def _frame(base: Path) -> Frame:
    return frame_in(base, read_header(base)) if is_gguf(base) else frame_of(load_config(base))


def _configuration(adapter: Path) -> dict[str, Any]:
    path = adapter / CONFIG_FILE
    try:
        config = json.loads(path.read_text("utf-8"))
        if not isinstance(config, dict):
            raise TypeError  # put into words below
    except (OSError, ValueError, TypeError) as error:
        raise AdapterError(
            f"{adapter} holds no readable {path.name} ({type(error).__name__}); {_ADVICE}"
        ) from None
    return cast("dict[str, Any]", config)


def _scale(adapter: Path) -> _Scale:
    config = _configuration(adapter)
    beyond = [key for key in _BEYOND if config.get(key)]
    if config.get("peft_type") != "LORA":
        beyond.append(f"type {config.get('peft_type')}")
    if config.get("bias", "none") != "none":
        beyond.append(f"bias {config['bias']}")
    if beyond:
        raise NotConvertible(
            f"the adapter in {adapter} is more than plain LoRA ({', '.join(beyond)}) and cannot be "
            "written as GGUF; run it through transformers"
        )
    try:
        return _Scale(
            alpha=float(config["lora_alpha"]),
            alphas=dict(config.get("alpha_pattern") or {}),
            square_root=bool(config.get("use_rslora")),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise AdapterError(
            f"{adapter / CONFIG_FILE} has no usable alpha ({type(error).__name__}); {_ADVICE}"
        ) from None


def _require_base(adapter: Path, base: Path) -> str:
    """Return the fingerprint of the base model, which the adapter must agree with."""
    # A file that was converted names the model that it was made of, and need not be hashed.
    origin = read_header(base).fingerprint if is_gguf(base) else None
    recorded = recorded_base(adapter)
    if recorded is None:  # written by others; nobody knows
        return origin or fingerprint(base)
    if recorded != origin and recorded != fingerprint(base):
        raise SchemaMismatch(
            f"the adapter in {adapter} belongs to base model {recorded[:12]}, not to "
            f"{fingerprint(base)[:12]} in {base}; use it with the base model that it was trained on"
        )
    return recorded


def _pairs(
    tensors: Mapping[str, "torch.Tensor"],
) -> dict[str, tuple["torch.Tensor", "torch.Tensor"]]:
    factors: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        match = _FACTOR.fullmatch(name)
        if match is None:
            raise NotConvertible(
                f"the adapter has the tensor {name}, which is no factor of plain LoRA; run it "
                "through transformers"
            )
        factors.setdefault(match[1], {})[match[2]] = tensor
    pairs: dict[str, _Pair] = {}
    for module, pair in factors.items():
        a, b = pair.get("A"), pair.get("B")
        if a is None or b is None or a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise AdapterError(
                f"the adapter's factors of {module} do not belong together; {_ADVICE}"
            )
        pairs[module] = (a, b)
    return pairs


def _place(module: str, frame: Frame) -> str:
    name = frame.gguf_name(f"{module}.weight")
    if name is None or name == "token_embd.weight" or (frame.tied and name == "output.weight"):
        raise NotConvertible(
            f"the adapter changes {module}, which llama.cpp cannot change in the architecture "
            f"{frame.name}; run it through transformers"
        )
    return name


def _tensor(name: str, values: "torch.Tensor") -> Tensor:
    data = values.float().contiguous().numpy().astype(np.float32)
    return Tensor(
        name=name,
        shape=data.shape,
        encoding=GGMLQuantizationType.F32,
        blocks=lambda: [data.tobytes()],
    )
