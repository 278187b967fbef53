"""A GGUF base model as transformers needs it for training: configuration and plain weights.

The reverse of ``architecture.py``. What cannot be turned back exactly is refused: a setting
or tensor that is left out would make training go on over another model, without a word.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from gguf import MODEL_ARCH_NAMES, dequantize
from numpy.typing import NDArray

from fedpeft.errors import NotConvertible
from fedpeft.gguf_format.architecture import FAMILIES, Frame
from fedpeft.gguf_format.header import Header, read_header

if TYPE_CHECKING:
    import torch

_MODEL_TYPES = {
    MODEL_ARCH_NAMES[family.gguf]: name for name, family in FAMILIES.items() if name != "mistral"
}
"""``model_type`` by architecture; Mistral's is Llama's."""


def frame_in(path: Path, header: Header) -> Frame:
    """Return the frame of a GGUF file's model.

    Raises:
        NotConvertible: fedpeft does not know its architecture.
    """
    if header.architecture not in _MODEL_TYPES:
        raise _refuse(path, f"its architecture is {header.architecture!r}")
    heads = _number(path, header, "attention.head_count")
    return Frame(
        model_type=_MODEL_TYPES[header.architecture],
        layers=_number(path, header, "block_count"),
        heads=heads,
        key_value_heads=int(cast("int", _value(header, "attention.head_count_kv", heads))),
        tied="output.weight" not in header.tensors,
    )


def settings_in(path: Path) -> dict[str, Any]:
    """Return ``model_type`` and settings from which transformers makes the configuration.

    Raises:
        NotConvertible: they cannot be told exactly from the file.
        ModelError: it is damaged.
    """
    header = read_header(path)
    frame = frame_in(path, header)
    width = _number(path, header, "embedding_length")
    head = int(cast("int", _value(header, "attention.key_length", width // frame.heads)))
    return {
        "model_type": frame.model_type,
        "hidden_size": width,
        "intermediate_size": _number(path, header, "feed_forward_length"),
        "num_hidden_layers": frame.layers,
        "num_attention_heads": frame.heads,
        "num_key_value_heads": frame.key_value_heads,
        "head_dim": head,
        "max_position_embeddings": _number(path, header, "context_length"),
        "rms_norm_eps": _value(header, "attention.layer_norm_rms_epsilon", 1e-5),
        "vocab_size": header.tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": frame.tied,
        "rope_parameters": _rotary(path, header, head),
        **{
            f"{name}_token_id": header.metadata.get(f"tokenizer.ggml.{key}_token_id")
            for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
        },
        **_own(path, header, frame, head),
    }


def _own(path: Path, header: Header, frame: Frame, head: int) -> dict[str, Any]:
    """Return what only one family has."""
    if frame.model_type == "llama":
        return {
            "attention_bias": "blk.0.attn_q.bias" in header.tensors,
            "mlp_bias": "blk.0.ffn_up.bias" in header.tensors,
        }
    if not frame.model_type.startswith("gemma"):
        return {"sliding_window": None}
    own: dict[str, Any] = {
        "sliding_window": _number(path, header, "attention.sliding_window"),
        "query_pre_attn_scalar": head,
    }
    if frame.model_type == "gemma2":
        for name in ("attn_logit_softcapping", "final_logit_softcapping"):
            own[name] = _value(header, name, None)
    return own


def _rotary(path: Path, header: Header, head: int) -> dict[str, Any]:
    theta = _value(header, "rope.freq_base", 10000.0)
    kind = _value(header, "rope.scaling.type", "none")
    plain: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    partial = int(cast("int", _value(header, "rope.dimension_count", head))) / head
    if partial != 1:
        plain["partial_rotary_factor"] = partial
    if kind == "linear":
        plain |= {"rope_type": "linear", "factor": _value(header, "rope.scaling.factor", None)}
    elif kind != "none":
        raise _refuse(path, f"its rotary embedding is scaled by {kind!r}")
    if header.architecture != "gemma3":
        return plain
    inside = _value(header, "rope.freq_base_swa", 10000.0)
    return {
        "full_attention": plain,
        "sliding_attention": {"rope_type": "default", "rope_theta": inside},
    }


def weights_in(path: Path, names: Iterable[str]) -> dict[str, "torch.Tensor"]:
    """Return the dequantised weights, 32 bits each, of all ``names`` of transformers.

    Raises:
        NotConvertible: the file has other tensors than transformers' model.
        ModelError: it is damaged.
    """
    import torch

    header = read_header(path)
    frame = frame_in(path, header)
    wanted = {name: frame.gguf_name(name) for name in names}
    if frame.tied:
        wanted.pop("lm_head.weight", None)
    if odd := set(wanted.values()) ^ set(header.tensors):
        raise _refuse(
            path, f"its tensors are not the architecture's, see {min(str(name) for name in odd)}"
        )
    mapped = np.memmap(path, dtype=np.uint8, mode="r")
    weights: dict[str, torch.Tensor] = {}
    for name, gguf_name in wanted.items():
        place = header.tensors[str(gguf_name)]
        data: NDArray[np.uint8] = mapped[place.begin : place.begin + place.nbytes]
        rows = data.reshape(*place.shape[:-1], -1)
        values = dequantize(rows, place.encoding).astype(np.float32).reshape(place.shape)
        weights[name] = frame.from_gguf(str(gguf_name), torch.from_numpy(values)).contiguous()
    return weights


def _refuse(path: Path, why: str) -> NotConvertible:
    return NotConvertible(
        f"{path} cannot be trained on exactly ({why}); use the model's directory of transformers"
    )


def _value(header: Header, key: str, default: object) -> object:
    return header.metadata.get(f"{header.architecture}.{key}", default)


def _number(path: Path, header: Header, key: str) -> int:
    value = _value(header, key, None)
    if not isinstance(value, int) or value < 1:
        raise _refuse(path, f"its {key} is {value}")
    return value
