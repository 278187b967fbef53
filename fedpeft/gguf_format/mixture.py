"""Which encoding each tensor gets: llama.cpp's mixtures, so that files are like everybody's.

``llama_tensor_get_type`` of llama.cpp's ``src/llama-quant.cpp``, without an importance matrix
and for dense models. Knows names and shapes, no values.
"""

import re
from dataclasses import dataclass
from typing import Literal, TypeAlias

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

Quantisation: TypeAlias = Literal["f32", "f16", "q8_0", "q4_0", "q4_k_m"]
FILE_TYPES: dict[Quantisation, LlamaFileType] = {
    "f32": LlamaFileType.ALL_F32,
    "f16": LlamaFileType.MOSTLY_F16,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
    "q4_0": LlamaFileType.MOSTLY_Q4_0,
    "q4_k_m": LlamaFileType.MOSTLY_Q4_K_M,
}
_Q = GGMLQuantizationType
_USUAL: dict[Quantisation, GGMLQuantizationType] = {
    "f32": _Q.F32,
    "f16": _Q.F16,
    "q8_0": _Q.Q8_0,
    "q4_0": _Q.Q4_0,
    "q4_k_m": _Q.Q4_K,
}
_NEXT_BEST = {_Q.Q4_K: _Q.Q5_0, _Q.Q5_K: _Q.Q5_1, _Q.Q6_K: _Q.Q8_0}
"""For rows that are no multiple of 256."""
_LAYER = re.compile(r"blk\.(\d+)\.(.+)\.weight")


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """The mixture of one model: ``tied`` says that its embeddings are its output layer too."""

    quantisation: Quantisation
    layers: int
    tied: bool

    def encoding(self, name: str, shape: tuple[int, ...]) -> GGMLQuantizationType:
        """Return the encoding of the tensor that GGUF calls ``name``."""
        # Vectors, norms and factors are few and are read as they are.
        if len(shape) < 2 or not name.endswith(".weight") or "_norm." in name:
            return _Q.F32
        usual = _USUAL[self.quantisation]
        if usual in (_Q.F32, _Q.F16):
            return usual
        return _fitting(self._wanted(name, shape[-1], usual), shape[-1])

    def _wanted(self, name: str, width: int, usual: GGMLQuantizationType) -> GGMLQuantizationType:
        if name == ("token_embd.weight" if self.tied else "output.weight"):
            if width % GGML_QUANT_SIZES[usual][0]:
                return _Q.Q8_0
            return usual if usual is _Q.Q8_0 else _Q.Q6_K
        layer = _LAYER.fullmatch(name)
        if layer is None or self.quantisation != "q4_k_m":
            return usual
        if layer[2] == "attn_qkv":
            return _Q.Q5_K
        if layer[2] in ("attn_v", "ffn_down") and self._matters_more(int(layer[1])):
            return _Q.Q6_K
        return usual

    def _matters_more(self, layer: int) -> bool:
        eighth = self.layers // 8
        return layer < eighth or layer >= 7 * self.layers // 8 or (layer - eighth) % 3 == 2


def _fitting(wanted: GGMLQuantizationType, width: int) -> GGMLQuantizationType:
    """Return ``wanted`` or what llama.cpp takes for rows that are not whole blocks of it."""
    for encoding in (wanted, _NEXT_BEST.get(wanted, wanted)):
        if width % GGML_QUANT_SIZES[encoding][0] == 0:
            return encoding
    return _Q.F16
