"""What llama.cpp must be told of each architecture, and which of its models it cannot run.

Maps a transformers configuration to metadata, and names and rows of its weights to those of
GGUF. Knows no files. A setting that llama.cpp does not have is refused by name, for it would
otherwise answer differently without a word.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, TensorNameMap, get_tensor_name_map
from numpy.typing import NDArray

from fedpeft.errors import NotConvertible
from fedpeft.gguf_format.layout import Value

if TYPE_CHECKING:
    import torch

_SILU = ("silu",)
_GELU = ("gelu_pytorch_tanh",)
_PARTS = re.compile(r"(.+)\.(weight|bias)")
_ROTATED = re.compile(r"blk\.\d+\.attn_(q|k)\.(weight|bias)")


@dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture of llama.cpp.

    ``rotates_pairs``: its rotary embedding turns neighbours (2i, 2i+1), where transformers
    turns the halves (i, i + d/2); so rows of q and k change places. ``adds_one``: its norms
    multiply by 1 + weight in transformers and by the weight in llama.cpp.
    """

    gguf: MODEL_ARCH
    activations: tuple[str, ...] = _SILU
    rotates_pairs: bool = False
    adds_one: bool = False
    must_be_off: tuple[str, ...] = ()


FAMILIES: Mapping[str, Family] = {
    "llama": Family(gguf=MODEL_ARCH.LLAMA, rotates_pairs=True),
    "mistral": Family(gguf=MODEL_ARCH.LLAMA, rotates_pairs=True),
    "qwen2": Family(gguf=MODEL_ARCH.QWEN2, must_be_off=("use_sliding_window",)),
    "qwen3": Family(gguf=MODEL_ARCH.QWEN3, must_be_off=("use_sliding_window", "attention_bias")),
    "gemma2": Family(
        gguf=MODEL_ARCH.GEMMA2, activations=_GELU, adds_one=True, must_be_off=("attention_bias",)
    ),
    "gemma3_text": Family(
        gguf=MODEL_ARCH.GEMMA3,
        activations=_GELU,
        adds_one=True,
        must_be_off=(
            "attention_bias",
            "attn_logit_softcapping",
            "final_logit_softcapping",
            "use_bidirectional_attention",
        ),
    ),
    "phi3": Family(gguf=MODEL_ARCH.PHI3),
}
"""By ``model_type`` of ``config.json``."""
_ALTERNATION = {"gemma2": 2, "gemma3_text": 6}
"""Every so many layers one attends to everything, the others to a window."""
_LARGEST_LAYERS = {"gemma2": 46, "gemma3_text": 62}
"""Layers of the 27B models, whose attention llama.cpp scales by width / heads."""


@dataclass(frozen=True, kw_only=True)
class Frame:
    """As much of a model as names and rows of its weights depend on."""

    model_type: str
    layers: int
    heads: int
    key_value_heads: int
    tied: bool

    @property
    def family(self) -> Family:
        """The architecture."""
        return FAMILIES[self.model_type]

    @property
    def name(self) -> str:
        """The architecture as llama.cpp calls it."""
        return MODEL_ARCH_NAMES[self.family.gguf]

    def gguf_name(self, name: str) -> str | None:
        """Return what GGUF calls the weight ``name`` of transformers; None if it has no such."""
        parts = _PARTS.fullmatch(name)
        if parts is None:
            return None
        found = _names(self.family.gguf, self.layers).get_name(parts[1])
        return None if found is None else f"{found}.{parts[2]}"

    def in_gguf(self, gguf_name: str, values: "torch.Tensor") -> "torch.Tensor":
        """Return ``values`` (outputs, ...) with its rows and numbers as llama.cpp wants them."""
        rotated = _ROTATED.fullmatch(gguf_name)
        if rotated is not None and self.family.rotates_pairs:
            return permuted(values, self.heads if rotated[1] == "q" else self.key_value_heads)
        if self.family.adds_one and gguf_name.endswith("_norm.weight"):
            return values.float() + 1
        return values

    def from_gguf(self, gguf_name: str, values: "torch.Tensor") -> "torch.Tensor":
        """Undo :meth:`in_gguf`."""
        rotated = _ROTATED.fullmatch(gguf_name)
        if rotated is not None and self.family.rotates_pairs:
            heads = self.heads if rotated[1] == "q" else self.key_value_heads
            return permuted_back(values, heads)
        if self.family.adds_one and gguf_name.endswith("_norm.weight"):
            return values - 1
        return values


@cache
def _names(architecture: MODEL_ARCH, layers: int) -> TensorNameMap:
    return get_tensor_name_map(architecture, layers)  # takes 15 ms


def permuted(values: "torch.Tensor", heads: int) -> "torch.Tensor":
    """Move row i of each head to 2i and row i + d/2 to 2i + 1; shape (heads · d, ...) stays."""
    half = values.shape[0] // heads // 2
    split = values.reshape(heads, 2, half, *values.shape[1:])
    return split.transpose(1, 2).reshape(values.shape)


def permuted_back(values: "torch.Tensor", heads: int) -> "torch.Tensor":
    """Undo :func:`permuted`."""
    half = values.shape[0] // heads // 2
    split = values.reshape(heads, half, 2, *values.shape[1:])
    return split.transpose(1, 2).reshape(values.shape)


def frame_of(config: Any) -> Frame:
    """Return the frame of a transformers configuration.

    Raises:
        NotConvertible: llama.cpp has no such architecture, or fedpeft does not know it.
    """
    if config.model_type not in FAMILIES:
        raise NotConvertible(
            f"the base model's architecture {config.model_type!r} cannot be written as GGUF "
            f"(those that can: {', '.join(FAMILIES)}); run it through transformers"
        )
    heads = config.num_attention_heads
    return Frame(
        model_type=config.model_type,
        layers=config.num_hidden_layers,
        heads=heads,
        key_value_heads=getattr(config, "num_key_value_heads", None) or heads,
        tied=bool(config.tie_word_embeddings),
    )


def model_metadata(config: Any) -> dict[str, Value]:
    """Return the metadata of the network: widths, heads, norms, windows, rotary embedding.

    Raises:
        NotConvertible: the model has a setting that llama.cpp does not have.
    """
    frame = frame_of(config)
    _require_expressible(config, frame.family)
    values: dict[str, Value] = {
        "block_count": frame.layers,
        "context_length": _context(config),
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": frame.heads,
        "attention.head_count_kv": frame.key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.key_length": head_width(config),
        "attention.value_length": head_width(config),
        "vocab_size": config.vocab_size,
        **_rotary(config),
    }
    if config.model_type in _ALTERNATION:
        values["attention.sliding_window"] = config.sliding_window
    if config.model_type == "gemma2":
        values["attn_logit_softcapping"] = float(config.attn_logit_softcapping)
        values["final_logit_softcapping"] = float(config.final_logit_softcapping)
    return {f"{frame.name}.{key}": value for key, value in values.items()}


def head_width(config: Any) -> int:
    """Return the width of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _refuse(setting: str, value: object) -> NotConvertible:
    return NotConvertible(
        f"the base model has {setting} = {value}, which llama.cpp cannot compute; run it through "
        "transformers"
    )


def _require_expressible(config: Any, family: Family) -> None:
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation not in family.activations:
        raise _refuse("hidden_act", activation)
    for setting in family.must_be_off:
        if value := getattr(config, setting, None):
            raise _refuse(setting, value)
    kinds = getattr(config, "layer_types", None)
    if config.model_type not in _ALTERNATION:
        return
    every = _ALTERNATION[config.model_type]
    whole = [(layer + 1) % every == 0 for layer in range(config.num_hidden_layers)]
    if kinds and [kind == "full_attention" for kind in kinds] != whole:
        raise _refuse("layer_types", "another alternation of windows than its family")
    scaled_by = head_width(config)
    if config.num_hidden_layers == _LARGEST_LAYERS[config.model_type]:
        scaled_by = config.hidden_size // config.num_attention_heads
    if config.query_pre_attn_scalar != scaled_by:
        raise _refuse("query_pre_attn_scalar", config.query_pre_attn_scalar)


def _context(config: Any) -> int:
    """Return the longest context; without windows in llama.cpp, no longer than the window."""
    context = int(config.max_position_embeddings)
    window = getattr(config, "sliding_window", None)
    if config.model_type in ("mistral", "phi3") and window:
        return min(context, int(window))
    return context


def rotary_parameters(config: Any) -> dict[str, Any]:
    """Return the rotary embedding's parameters (of the layers without a window)."""
    parameters: dict[str, Any] = dict(config.rope_parameters)
    return dict(parameters.get("full_attention", parameters))


def _rotary(config: Any) -> dict[str, Value]:
    rotary = rotary_parameters(config)
    kind = rotary.get("rope_type", "default")
    partial = float(rotary.get("partial_rotary_factor", 1.0) or 1.0)
    values: dict[str, Value] = {
        "rope.freq_base": float(rotary["rope_theta"]),
        "rope.dimension_count": int(head_width(config) * partial),
    }
    if config.model_type == "gemma3_text":
        inside = config.rope_parameters["sliding_attention"]
        if inside.get("rope_type", "default") != "default":
            raise _refuse("rope_type within windows", inside["rope_type"])
        values["rope.freq_base_swa"] = float(inside["rope_theta"])
    if kind in ("default", "llama3"):  # the latter's factors are a tensor
        return values
    if kind == "linear":
        return {**values, "rope.scaling.type": "linear", "rope.scaling.factor": rotary["factor"]}
    if kind == "yarn":
        return values | _yarn(rotary)
    if kind == "longrope" and config.model_type == "phi3":
        return values | _longrope(config, rotary)
    raise _refuse("rope_type", kind)


def _yarn(rotary: Mapping[str, Any]) -> dict[str, Value]:
    usual = {"beta_fast": 32, "beta_slow": 1, "attention_factor": None, "mscale": None}
    for setting, value in {**usual, "mscale_all_dim": None, "truncate": True}.items():
        if rotary.get(setting, value) not in (value, None):
            raise _refuse(f"rope_parameters.{setting}", rotary[setting])
    return {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(rotary["factor"]),
        "rope.scaling.original_context_length": int(rotary["original_max_position_embeddings"]),
    }


def _longrope(config: Any, rotary: Mapping[str, Any]) -> dict[str, Value]:
    original = int(
        rotary.get("original_max_position_embeddings")
        or getattr(config, "original_max_position_embeddings", config.max_position_embeddings)
    )
    factor = config.max_position_embeddings / original
    usual = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return {
        "rope.scaling.attn_factor": float(rotary.get("attention_factor") or usual),
        "rope.scaling.original_context_length": original,
    }


def rotary_tensors(config: Any) -> dict[str, NDArray[np.float32]]:
    """Return the factors by which frequencies are divided, where they are a tensor in GGUF."""
    rotary = rotary_parameters(config)
    if rotary.get("rope_type") == "longrope":
        return {
            f"rope_factors_{length}.weight": np.asarray(rotary[f"{length}_factor"], np.float32)
            for length in ("long", "short")
        }
    if rotary.get("rope_type") != "llama3":
        return {}
    exponents = np.arange(0, head_width(config), 2, dtype=np.float64) / head_width(config)
    # How often a frequency turns within the context that the model first learnt.
    turns = rotary["original_max_position_embeddings"] / (
        2 * np.pi * rotary["rope_theta"] ** exponents
    )
    low, high = rotary["low_freq_factor"], rotary["high_freq_factor"]
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    factors = 1 / ((1 - smooth) / rotary["factor"] + smooth)
    return {"rope_freqs.weight": factors.astype(np.float32)}
