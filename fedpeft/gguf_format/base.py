"""Write a base model's directory as one GGUF file, tensor by tensor from the mapped weights."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from fedpeft.errors import ModelError, NotConvertible
from fedpeft.gguf_format.architecture import Frame, frame_of, model_metadata, rotary_tensors
from fedpeft.gguf_format.header import FINGERPRINT, QUANTISATION
from fedpeft.gguf_format.layout import Observe, Tensor, Value, write_gguf
from fedpeft.gguf_format.mixture import FILE_TYPES, Mixture, Quantisation
from fedpeft.gguf_format.native import quantise
from fedpeft.gguf_format.source import Weights, load_config, load_tokenizer
from fedpeft.gguf_format.vocabulary import vocabulary_metadata, vocabulary_name
from fedpeft.weight_files import fingerprint

if TYPE_CHECKING:
    import torch

_BLOCK_VALUES = 1 << 22
"""Values that are converted at once: 16 MiB in 32 bits."""
_NOT_A_WEIGHT = "rotary_emb.inv_freq"
_ONCE = ("token_embd.weight", "output_norm.weight")
"""What every model has beside its layers."""


def write_base(
    directory: Path, path: Path, quantisation: Quantisation, *, observe: Observe | None = None
) -> None:
    """Write the base model in ``directory`` to ``path``, which appears whole or not at all.

    The file carries the fingerprint of ``directory``, the tokenizer and the chat template
    (fedpeft's own where the model has none). The same directory gives the same bytes.
    ``observe`` is told how many bytes of tensors are written, and of how many. Weights are
    read from the mapped files and converted a few rows at a time.

    Raises:
        NotConvertible: llama.cpp cannot run such a model exactly.
        ModelError: the directory is incomplete or damaged.
        StorageError: the file cannot be written.
    """
    config = load_config(directory)
    frame = frame_of(config)
    tokenizer = load_tokenizer(directory)
    rules: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    metadata: dict[str, Value] = {
        "general.architecture": frame.name,
        "general.type": "model",
        "general.name": vocabulary_name(frame.model_type, rules),
        "general.file_type": int(FILE_TYPES[quantisation]),
        "general.quantization_version": 2,
        FINGERPRINT: fingerprint(directory),
        QUANTISATION: quantisation,
        **model_metadata(config),
        **vocabulary_metadata(tokenizer, rules, config.vocab_size),
    }
    mixture = Mixture(quantisation=quantisation, layers=frame.layers, tied=frame.tied)
    with Weights.opened(directory) as weights:
        tensors = [*_factors(config), *_tensors(weights, frame, mixture)]
        write_gguf(path, metadata, sorted(tensors, key=_order), observe)


def _order(tensor: Tensor) -> tuple[int, str]:
    """Order tensors by layer, what is beside the layers first, so that a file is always alike."""
    parts = tensor.name.split(".")
    return (int(parts[1]) if parts[0] == "blk" else -1, tensor.name)


def _factors(config: Any) -> Iterator[Tensor]:
    for name, values in rotary_tensors(config).items():
        yield Tensor(
            name=name,
            shape=values.shape,
            encoding=GGMLQuantizationType.F32,
            blocks=lambda values=values: [values.tobytes()],
        )


def _tensors(weights: Weights, frame: Frame, mixture: Mixture) -> list[Tensor]:
    """Return all tensors of the model, none of them read yet.

    Raises:
        NotConvertible: GGUF has no name for one of them.
        ModelError: one is missing.
    """
    found: list[Tensor] = []
    for name, shape in weights.shapes().items():
        if name.endswith(_NOT_A_WEIGHT) or (frame.tied and name == "lm_head.weight"):
            continue
        gguf_name = frame.gguf_name(name)
        if gguf_name is None:
            raise NotConvertible(
                f"the base model has the weight {name}, which llama.cpp does not know in the "
                f"architecture {frame.name}; run it through transformers"
            )
        encoding = mixture.encoding(gguf_name, shape)
        blocks = partial(_blocks, weights, frame, name, gguf_name, encoding)
        found.append(Tensor(name=gguf_name, shape=shape, encoding=encoding, blocks=blocks))
    _require_all({tensor.name for tensor in found}, frame)
    return found


def _require_all(names: set[str], frame: Frame) -> None:
    kinds = {name.split(".", 2)[2] for name in names if name.startswith("blk.")}
    wanted = {f"blk.{layer}.{kind}" for layer in range(frame.layers) for kind in kinds}
    wanted |= {*_ONCE, *(() if frame.tied else ("output.weight",))}
    if missing := wanted - names:
        raise ModelError(
            f"the base model's weights lack {len(missing)} tensors of the model that config.json "
            f"describes, such as {min(missing)}; copy the whole model directory again"
        )


def _blocks(
    weights: Weights, frame: Frame, name: str, gguf_name: str, encoding: GGMLQuantizationType
) -> Iterator[bytes]:
    values = frame.in_gguf(gguf_name, weights.tensor(name))
    rows = values.reshape(-1, values.shape[-1])
    step = max(1, _BLOCK_VALUES // rows.shape[1])
    for begin in range(0, rows.shape[0], step):
        yield _encoded(rows[begin : begin + step], encoding, name)


def _encoded(rows: "torch.Tensor", encoding: GGMLQuantizationType, name: str) -> bytes:
    values: NDArray[np.float32] = rows.float().contiguous().numpy()
    with np.errstate(over="ignore"):  # what does not fit is found below
        stored = values.astype(np.float16) if encoding is GGMLQuantizationType.F16 else values
    if not np.isfinite(stored).all():
        raise NotConvertible(
            f"the base model's weight {name} has values that are not finite or do not fit into "
            "16 bits; run it through transformers"
        )
    if encoding in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
        return stored.tobytes()
    return quantise(values, encoding)
