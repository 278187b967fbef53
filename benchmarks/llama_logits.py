"""Every logit of llama.cpp for a GGUF model: its C interface, called where the wheel has it.

The wheel's server gives the probabilities of tokens that it generates, and none of a text that
it is given; so agreement with transformers is measured here. Also loaded by tests/core/.
"""

import ctypes
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

_F32, _F16 = 0, 1
_BY_ITSELF, _NEVER = -1, 0
_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_SILENT = _LOG(lambda _level, _text, _data: None)


class _ModelParams(ctypes.Structure):
    """Passed by value and only ever as the library fills it; longer than any release's."""

    _fields_ = (("_all", ctypes.c_uint8 * 512),)


class _ContextParams(ctypes.Structure):
    """What is set here; the rest is left as the library fills it."""

    _fields_ = (
        ("n_ctx", ctypes.c_uint32),
        ("n_batch", ctypes.c_uint32),
        ("n_ubatch", ctypes.c_uint32),
        ("_before_threads", ctypes.c_uint8 * 16),
        ("n_threads", ctypes.c_int32),
        ("n_threads_batch", ctypes.c_int32),
        ("_before_attention", ctypes.c_uint8 * 16),
        ("flash_attn_type", ctypes.c_int32),
        ("_before_cache", ctypes.c_uint8 * 48),
        ("type_k", ctypes.c_int32),
        ("type_v", ctypes.c_int32),
        ("_rest", ctypes.c_uint8 * 912),
    )


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


def _library() -> Any:
    found = importlib.util.find_spec("xllamacpp.xllamacpp")
    if found is None or found.origin is None:
        raise ImportError("xllamacpp is not installed")
    library = ctypes.CDLL(found.origin)
    library.llama_log_set(_SILENT, None)
    returns: dict[str, Any] = {
        "llama_model_default_params": _ModelParams,
        "llama_context_default_params": _ContextParams,
        "llama_model_load_from_file": ctypes.c_void_p,
        "llama_init_from_model": ctypes.c_void_p,
        "llama_adapter_lora_init": ctypes.c_void_p,
        "llama_model_get_vocab": ctypes.c_void_p,
        "llama_get_memory": ctypes.c_void_p,
        "llama_get_logits": ctypes.POINTER(ctypes.c_float),
        "llama_batch_init": _Batch,
    }
    for name, kind in returns.items():
        getattr(library, name).restype = kind
    library.llama_model_load_from_file.argtypes = [ctypes.c_char_p, _ModelParams]
    library.llama_init_from_model.argtypes = [ctypes.c_void_p, _ContextParams]
    library.llama_adapter_lora_init.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    library.llama_model_get_vocab.argtypes = [ctypes.c_void_p]
    library.llama_vocab_n_tokens.argtypes = [ctypes.c_void_p]
    library.llama_get_memory.argtypes = [ctypes.c_void_p]
    library.llama_memory_clear.argtypes = [ctypes.c_void_p, ctypes.c_bool]
    library.llama_memory_clear.restype = None
    library.llama_decode.argtypes = [ctypes.c_void_p, _Batch]
    library.llama_get_logits.argtypes = [ctypes.c_void_p]
    library.llama_tokenize.argtypes = [
        ctypes.c_void_p,
        ctypes.c_char_p,
        ctypes.c_int32,
        ctypes.POINTER(ctypes.c_int32),
        ctypes.c_int32,
        ctypes.c_bool,
        ctypes.c_bool,
    ]
    for name in ("llama_free", "llama_model_free"):
        getattr(library, name).argtypes = [ctypes.c_void_p]
        getattr(library, name).restype = None
    return library


class LlamaModel:
    """A GGUF model with at most one adapter on it, and one sequence. Use it in a ``with``."""

    def __init__(
        self,
        path: Path,
        *,
        adapter: Path | None = None,
        context: int = 512,
        exact: bool = False,
        threads: int = 1,
    ) -> None:
        """Load ``path`` with the library's default settings and a context of that many tokens.

        With ``exact`` attention computes in 32 bits, where it takes 16 by default.
        """
        self._library = _library()
        self._context = None
        self._model = self._library.llama_model_load_from_file(
            str(path).encode(), self._library.llama_model_default_params()
        )
        if not self._model:
            raise ValueError(f"llama.cpp does not load {path}")
        params = self._library.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = context
        if (params.type_k, params.type_v, params.flash_attn_type) != (_F16, _F16, _BY_ITSELF):
            raise ValueError("this release of llama.cpp has other context parameters")
        params.n_threads = params.n_threads_batch = threads
        if exact:
            params.type_k, params.type_v, params.flash_attn_type = _F32, _F32, _NEVER
        self._context = self._library.llama_init_from_model(self._model, params)
        if not self._context:
            raise ValueError(f"llama.cpp makes no context of {context} tokens for {path}")
        self._vocabulary = self._library.llama_model_get_vocab(self._model)
        self.tokens = int(self._library.llama_vocab_n_tokens(self._vocabulary))
        self._length = 0
        self._batch = self._library.llama_batch_init(context, 0, 1)
        if adapter is not None:
            self._put_on(adapter)

    def _put_on(self, adapter: Path) -> None:
        loaded = self._library.llama_adapter_lora_init(self._model, str(adapter).encode())
        if not loaded:
            raise ValueError(f"llama.cpp does not load the adapter {adapter}")
        adapters = (ctypes.c_void_p * 1)(loaded)
        scales = (ctypes.c_float * 1)(1.0)
        set_adapters = self._library.llama_set_adapters_lora
        set_adapters.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
        if set_adapters(self._context, adapters, 1, scales):
            raise ValueError(f"llama.cpp does not take the adapter {adapter}")

    def __enter__(self) -> "LlamaModel":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._library.llama_free(self._context)
        self._library.llama_model_free(self._model)

    def logits(self, tokens: Sequence[int], *, keep: bool = False) -> NDArray[np.float32]:
        """Return the logits after each of ``tokens``, shape (tokens, vocabulary).

        With ``keep`` they follow those of the call before, else they begin a new text.
        """
        if not keep:
            self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)
            self._length = 0
        batch = self._batch
        batch.n_tokens = len(tokens)
        for place, token in enumerate(tokens):
            batch.token[place], batch.pos[place] = int(token), self._length + place
            batch.n_seq_id[place], batch.logits[place] = 1, 1
            batch.seq_id[place][0] = 0
        if self._library.llama_decode(self._context, batch):
            raise ValueError(f"llama.cpp cannot compute {len(tokens)} tokens")
        self._length += len(tokens)
        found = self._library.llama_get_logits(self._context)
        return np.ctypeslib.as_array(found, (len(tokens), self.tokens)).copy()

    def tokenize(self, text: str, *, add_special: bool) -> list[int]:
        """Return the tokens of ``text``; special ones are recognised in it."""
        data = text.encode()
        room = (ctypes.c_int32 * (len(data) + 8))()
        count = self._library.llama_tokenize(
            self._vocabulary, data, len(data), room, len(room), add_special, True
        )
        return list(room[:count])

    def greedy(self, prompt: Sequence[int], count: int, stop: Sequence[int]) -> list[int]:
        """Return ``count`` most likely tokens after ``prompt``, fewer where one is of ``stop``."""
        row = self.logits(prompt)[-1]
        answer: list[int] = []
        while len(answer) < count:
            answer.append(int(row.argmax()))
            if answer[-1] in stop or len(answer) == count:
                break
            row = self.logits(answer[-1:], keep=True)[-1]
        return answer
