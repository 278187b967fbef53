"""The C interface of llama.cpp, as the xllamacpp wheel exports it, through ctypes.

The wheel's own server loads adapters only when it starts, lets requests for one adapter
wait as long as another one's are running, and keeps prompts in a cache that does not know
under which adapter they were read. So the engine drives the library itself, and nothing
listens anywhere. ctypes gives the interpreter free while C code runs.

The layout of two structures is that of the release below (``include/llama.h``); their
defaults are compared value by value before anything else is called. Nothing that llama.cpp
would log is printed: it can quote prompts.
"""

import ctypes as c
import importlib.util
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from fedpeft.errors import InferenceError

RELEASE: Final = "2026.10.11549"
"""The release of xllamacpp whose header these declarations were taken from."""


class ModelParams(c.Structure):
    """``struct llama_model_params``; what is not named is left as it is by default."""

    _fields_ = [
        ("devices", c.c_void_p),
        ("tensor_buft_overrides", c.c_void_p),
        ("n_gpu_layers", c.c_int32),
        ("split_mode", c.c_int32),
        ("load_mode", c.c_int32),
        ("lazy_mode", c.c_int32),
        ("main_gpu", c.c_int32),
        ("tensor_split", c.c_void_p),
        ("progress_callback", c.c_void_p),
        ("progress_callback_user_data", c.c_void_p),
        ("kv_overrides", c.c_void_p),
        ("vocab_only", c.c_bool),
        ("check_tensors", c.c_bool),
        ("use_extra_bufts", c.c_bool),
        ("no_host", c.c_bool),
        ("no_alloc", c.c_bool),
        ("load_mtp", c.c_bool),
    ]


class ContextParams(c.Structure):
    """``struct llama_context_params``."""

    _fields_ = [
        ("n_ctx", c.c_uint32),
        ("n_batch", c.c_uint32),
        ("n_ubatch", c.c_uint32),
        ("n_seq_max", c.c_uint32),
        ("n_rs_seq", c.c_uint32),
        ("n_outputs_max", c.c_uint32),
        ("n_outputs_max_per_seq", c.c_uint32),
        ("n_threads", c.c_int32),
        ("n_threads_batch", c.c_int32),
        ("ctx_type", c.c_int32),
        ("rope_scaling_type", c.c_int32),
        ("pooling_type", c.c_int32),
        ("attention_type", c.c_int32),
        ("flash_attn_type", c.c_int32),
        ("rope_freq_base", c.c_float),
        ("rope_freq_scale", c.c_float),
        ("yarn_ext_factor", c.c_float),
        ("yarn_attn_factor", c.c_float),
        ("yarn_beta_fast", c.c_float),
        ("yarn_beta_slow", c.c_float),
        ("yarn_orig_ctx", c.c_uint32),
        ("defrag_thold", c.c_float),
        ("cb_eval", c.c_void_p),
        ("cb_eval_user_data", c.c_void_p),
        ("type_k", c.c_int32),
        ("type_v", c.c_int32),
        ("moe_cache_size", c.c_size_t),
        ("abort_callback", c.c_void_p),
        ("abort_callback_data", c.c_void_p),
        ("embeddings", c.c_bool),
        ("offload_kqv", c.c_bool),
        ("no_perf", c.c_bool),
        ("op_offload", c.c_bool),
        ("swa_full", c.c_bool),
        ("kv_unified", c.c_bool),
        ("samplers", c.c_void_p),
        ("n_samplers", c.c_size_t),
        ("ctx_other", c.c_void_p),
    ]


class Batch(c.Structure):
    """``struct llama_batch``: tokens of any sequences, each with its position."""

    _fields_ = [
        ("n_tokens", c.c_int32),
        ("token", c.POINTER(c.c_int32)),
        ("embd", c.c_void_p),
        ("pos", c.POINTER(c.c_int32)),
        ("n_seq_id", c.POINTER(c.c_int32)),
        ("seq_id", c.POINTER(c.POINTER(c.c_int32))),
        ("logits", c.POINTER(c.c_int8)),
    ]


class ChainParams(c.Structure):
    """``struct llama_sampler_chain_params``."""

    _fields_ = [("no_perf", c.c_bool)]


_LOG = c.CFUNCTYPE(None, c.c_int, c.c_char_p, c.c_void_p)
_POINTER, _TEXT, _INT, _UINT, _BOOL = c.c_void_p, c.c_char_p, c.c_int32, c.c_uint32, c.c_bool

_FUNCTIONS: Final[dict[str, tuple[Any, tuple[Any, ...]]]] = {
    "llama_backend_init": (None, ()),
    "llama_log_set": (None, (_LOG, _POINTER)),
    "llama_model_default_params": (ModelParams, ()),
    "llama_context_default_params": (ContextParams, ()),
    "llama_model_load_from_file": (_POINTER, (_TEXT, ModelParams)),
    "llama_model_free": (None, (_POINTER,)),
    "llama_model_get_vocab": (_POINTER, (_POINTER,)),
    "llama_model_n_ctx_train": (_INT, (_POINTER,)),
    "llama_model_chat_template": (_TEXT, (_POINTER, _TEXT)),
    "llama_init_from_model": (_POINTER, (_POINTER, ContextParams)),
    "llama_free": (None, (_POINTER,)),
    "llama_n_ctx": (_UINT, (_POINTER,)),
    "llama_get_memory": (_POINTER, (_POINTER,)),
    "llama_memory_seq_rm": (_BOOL, (_POINTER, _INT, _INT, _INT)),
    "llama_decode": (_INT, (_POINTER, Batch)),
    "llama_adapter_lora_init": (_POINTER, (_POINTER, _TEXT)),
    "llama_adapter_lora_free": (None, (_POINTER,)),
    "llama_set_adapters_lora": (
        _INT,
        (_POINTER, c.POINTER(c.c_void_p), c.c_size_t, c.POINTER(c.c_float)),
    ),
    "llama_vocab_n_tokens": (_INT, (_POINTER,)),
    "llama_vocab_is_eog": (_BOOL, (_POINTER, _INT)),
    "llama_vocab_bos": (_INT, (_POINTER,)),
    "llama_vocab_eos": (_INT, (_POINTER,)),
    "llama_vocab_get_add_bos": (_BOOL, (_POINTER,)),
    "llama_vocab_get_text": (_TEXT, (_POINTER, _INT)),
    "llama_tokenize": (_INT, (_POINTER, _TEXT, _INT, c.POINTER(_INT), _INT, _BOOL, _BOOL)),
    "llama_token_to_piece": (_INT, (_POINTER, _INT, c.c_char_p, _INT, _INT, _BOOL)),
    "llama_sampler_chain_default_params": (ChainParams, ()),
    "llama_sampler_chain_init": (_POINTER, (ChainParams,)),
    "llama_sampler_chain_add": (None, (_POINTER, _POINTER)),
    "llama_sampler_init_greedy": (_POINTER, ()),
    "llama_sampler_init_temp": (_POINTER, (c.c_float,)),
    "llama_sampler_init_top_p": (_POINTER, (c.c_float, c.c_size_t)),
    "llama_sampler_init_dist": (_POINTER, (_UINT,)),
    "llama_sampler_sample": (_INT, (_POINTER, _POINTER, _INT)),
    "llama_sampler_free": (None, (_POINTER,)),
}


def _expected_model() -> ModelParams:
    return ModelParams(
        n_gpu_layers=-1, split_mode=1, load_mode=-1, lazy_mode=1, use_extra_bufts=True
    )


def _expected_context() -> ContextParams:
    return ContextParams(
        n_ctx=512, n_batch=2048, n_ubatch=512, n_seq_max=1, n_outputs_max_per_seq=1,
        n_threads=4, n_threads_batch=4, rope_scaling_type=-1, pooling_type=-1,
        attention_type=-1, flash_attn_type=-1, yarn_ext_factor=-1, yarn_attn_factor=-1,
        yarn_beta_fast=-1, yarn_beta_slow=-1, defrag_thold=-1, type_k=1, type_v=1,
        offload_kqv=True, no_perf=True, op_offload=True, swa_full=True,
    )  # fmt: skip


@_LOG
def _silent(_level: int, _text: bytes, _data: object) -> None:
    """Take what llama.cpp would print."""


@cache
def library() -> Any:
    """Return the library with every function above declared.

    Raises:
        InferenceError: xllamacpp cannot be loaded, or is another release than the one
            that these declarations belong to.
    """
    _load_openmp()
    try:
        # Imported here: it takes half a second, which commands that compute nothing can save.
        import xllamacpp.xllamacpp as extension
    except ImportError as error:
        raise InferenceError(
            f"llama.cpp cannot be loaded ({error}): install fedpeft-client again, and on Debian "
            "the package libgomp1"
        ) from error
    try:
        loaded = c.CDLL(extension.__file__)
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(loaded, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise InferenceError(_other_release()) from error
    defaults = (loaded.llama_model_default_params(), loaded.llama_context_default_params())
    expected = (_expected_model(), _expected_context())
    if [_values(each) for each in defaults] != [_values(each) for each in expected]:
        raise InferenceError(_other_release())
    loaded.llama_log_set(_silent, None)
    loaded.llama_backend_init()
    return loaded


def _load_openmp() -> None:
    """Load the OpenMP that torch brings along: a bare Debian has none, and two would compete."""
    torch = importlib.util.find_spec("torch")
    if torch is not None and torch.origin is not None:
        for path in (Path(torch.origin).parent / "lib").glob("libgomp.so.1"):
            c.CDLL(str(path), mode=c.RTLD_GLOBAL)


def _values(structure: c.Structure) -> list[Any]:
    return [getattr(structure, name) for name, *_ in structure._fields_]


def _other_release() -> str:
    found = metadata.version("xllamacpp")
    return (
        f"the installed xllamacpp {found} is not the release {RELEASE} that fedpeft was built on: "
        f"install it again with pip install xllamacpp=={RELEASE}"
    )
