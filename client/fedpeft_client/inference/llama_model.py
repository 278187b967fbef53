"""A GGUF base model in memory with its tokens, its context and any number of LoRA adapters.

Must not know requests, turns or text: it decodes tokens of numbered slots. One thread at
a time may use it, except for :class:`Vocabulary`, which never changes.
"""

import ctypes as c
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fedpeft.errors import InferenceError, ModelError
from fedpeft_client.inference.engine import Sampling
from fedpeft_client.inference.llama_cpp import Batch, library

BATCH_TOKENS: Final = 512
"""Tokens of one decoding step at most."""

_MAPPED: Final = 1  # LLAMA_LOAD_MODE_MMAP
_NO_ROOM: Final = 1  # llama_decode: no free cells, nothing was changed


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA adapter in memory. Two of them are never equal, so none is taken for another."""

    name: str
    handle: int


@dataclass(frozen=True, slots=True)
class Row:
    """A token to decode: whose, where in its sequence, and whether the next one is wanted."""

    token: int
    slot: int
    position: int
    wanted: bool


class Vocabulary:
    """The tokens of a model."""

    def __init__(self, model: int) -> None:
        self._lib: Any = library()
        self._model = model
        self._handle = self._lib.llama_model_get_vocab(model)
        self._bos: int = self._lib.llama_vocab_bos(self._handle)
        self._adds_bos = bool(self._lib.llama_vocab_get_add_bos(self._handle)) and self._bos >= 0

    @property
    def template(self) -> str | None:
        """The chat template that the GGUF carries."""
        found: bytes | None = self._lib.llama_model_chat_template(self._model, None)
        return found.decode() if found else None

    @property
    def bos(self) -> str:
        """The text of the token that begins a text; empty if there is none."""
        return self._special(self._bos)

    @property
    def eos(self) -> str:
        """The text of the token that ends a text; empty if there is none."""
        return self._special(self._lib.llama_vocab_eos(self._handle))

    def _special(self, token: int) -> str:
        text: bytes = self._lib.llama_vocab_get_text(self._handle, token) if token >= 0 else b""
        return text.decode()

    def tokens(self, text: str) -> list[int]:
        """Tokenise a text; the names of special tokens in it become these tokens.

        As in training, BOS stands in front if the model wants one and the text has none.
        """
        encoded = text.encode()
        room = len(encoded) + 8
        found = (c.c_int32 * room)()
        count: int = self._lib.llama_tokenize(
            self._handle, encoded, len(encoded), found, room, False, True
        )
        if count < 0:
            raise InferenceError("the model's tokenizer cannot read the prompt: shorten it")
        tokens = list(found[:count])
        if self._adds_bos and tokens[:1] != [self._bos]:
            tokens.insert(0, self._bos)
        return tokens

    def piece(self, token: int) -> bytes:
        """Return the bytes that a token stands for; a special token stands for none."""
        room = 64
        while True:
            found = c.create_string_buffer(room)
            size: int = self._lib.llama_token_to_piece(self._handle, token, found, room, 0, False)
            if size >= 0:
                return found.raw[:size]
            room = -size

    def ends(self, token: int) -> bool:
        """Say whether a model ends its answer with this token."""
        return bool(self._lib.llama_vocab_is_eog(self._handle, token))


class LlamaModel:
    """A base model that is mapped from its file once, whatever adapters are used with it."""

    def __init__(self, path: Path, *, cells: int, slots: int, threads: int) -> None:
        """Map ``path`` and make room for ``cells`` tokens, which all slots share.

        Raises:
            ModelError: the file is no model that llama.cpp can load.
            InferenceError: there is not enough memory.
        """
        self._lib: Any = library()
        options = self._lib.llama_model_default_params()
        options.load_mode = _MAPPED
        self._model: int | None = self._lib.llama_model_load_from_file(str(path).encode(), options)
        if not self._model:
            raise ModelError(
                f"{path} cannot be loaded: it is damaged, or no language model that this release "
                "of llama.cpp knows; remove it, so that it is made anew, or copy it here again"
            )
        self._context: int | None = self._make_context(cells, slots, threads)
        if not self._context:
            self.close()
            raise InferenceError(
                f"there is not enough memory for a context of {cells} tokens: lower "
                "inference.context or inference.parallel in client.toml"
            )
        self.cells: int = self._lib.llama_n_ctx(self._context)
        self.trained_context: int = self._lib.llama_model_n_ctx_train(self._model)
        self.vocabulary = Vocabulary(self._model)
        self._memory: int = self._lib.llama_get_memory(self._context)
        self._adapter: Adapter | None = None
        self._arrays = _BatchArrays()

    def _make_context(self, cells: int, slots: int, threads: int) -> int | None:
        options = self._lib.llama_context_default_params()
        options.n_ctx, options.n_seq_max, options.kv_unified = cells, slots, True
        options.n_batch = options.n_ubatch = BATCH_TOKENS
        # One prediction a slot and step; room for one of every token would be 100 MB and more.
        options.n_outputs_max = slots
        options.n_threads = options.n_threads_batch = threads
        return self._lib.llama_init_from_model(self._model, options)

    def load_adapter(self, name: str, path: Path) -> Adapter:
        """Load a LoRA GGUF beside those that are there.

        Raises:
            ModelError: the file is damaged, or of another architecture.
        """
        handle: int | None = self._lib.llama_adapter_lora_init(self._model, str(path).encode())
        if not handle:
            raise ModelError(
                f"the adapter {name} cannot be loaded from {path}: the file is damaged, or of "
                "another base model; remove it, so that it is made anew"
            )
        return Adapter(name, handle)

    def free_adapter(self, adapter: Adapter) -> None:
        """Unload an adapter; no slot may hold tokens that were decoded with it."""
        if self._adapter is adapter:
            self._select(None)
        self._lib.llama_adapter_lora_free(adapter.handle)

    def forget(self, slot: int, position: int) -> bool:
        """Drop a slot's tokens from ``position`` on; False: this model can only drop all."""
        return bool(self._lib.llama_memory_seq_rm(self._memory, slot, position, -1))

    def decode(self, rows: Sequence[Row], adapter: Adapter | None) -> bool:
        """Decode up to ``BATCH_TOKENS`` rows with one adapter; False: no free cells for them.

        Raises:
            InferenceError: the computation failed; the slots of the rows hold nothing certain.
        """
        self._select(adapter)
        status: int = self._lib.llama_decode(self._context, self._arrays.filled(rows))
        if status not in (0, _NO_ROOM):
            raise InferenceError(
                f"llama.cpp could not compute a step (status {status}): ask again, and with less "
                "text if the machine is short of memory"
            )
        return status == 0

    def _select(self, adapter: Adapter | None) -> None:
        if adapter is self._adapter:
            return
        count = 0 if adapter is None else 1
        handles = (c.c_void_p * 1)(None if adapter is None else adapter.handle)
        self._lib.llama_set_adapters_lora(self._context, handles, count, (c.c_float * 1)(1.0))
        self._adapter = adapter

    def sampler(self, options: Sampling, seed: int) -> "Sampler":
        """Return what chooses tokens by ``options``; the caller closes it."""
        return Sampler(self._lib, self._context, options, seed)

    def close(self) -> None:
        """Free everything, adapters too; nothing of this may be used after it."""
        if self._context:
            self._lib.llama_free(self._context)
        if self._model:
            self._lib.llama_model_free(self._model)
        self._context = self._model = None


class Sampler:
    """Chooses one request's tokens: temperature first, then the likeliest of ``top_p``."""

    def __init__(self, lib: Any, context: int | None, options: Sampling, seed: int) -> None:
        self._lib, self._context = lib, context
        self._chain: int = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        parts: list[int] = []
        if options.temperature == 0:
            parts.append(lib.llama_sampler_init_greedy())
        else:
            parts.append(lib.llama_sampler_init_temp(options.temperature))
            if options.top_p < 1:
                parts.append(lib.llama_sampler_init_top_p(options.top_p, 1))
            parts.append(lib.llama_sampler_init_dist(seed))
        for part in parts:
            lib.llama_sampler_chain_add(self._chain, part)

    def choose(self, index: int) -> int:
        """Return the token after the row with this index in the last step."""
        return self._lib.llama_sampler_sample(self._chain, self._context, index)

    def close(self) -> None:
        """Free it."""
        self._lib.llama_sampler_free(self._chain)


class _BatchArrays:
    """The memory of one batch, filled anew for every step."""

    def __init__(self) -> None:
        n = BATCH_TOKENS
        self._token, self._position = (c.c_int32 * n)(), (c.c_int32 * n)()
        self._slots = [(c.c_int32 * 1)() for _ in range(n)]
        self._wanted = (c.c_int8 * n)()
        self._counts = (c.c_int32 * n)(*([1] * n))
        pointer = c.POINTER(c.c_int32)
        self._pointers = (pointer * n)(*(c.cast(each, pointer) for each in self._slots))
        self._batch = Batch(
            0, self._token, None, self._position, self._counts, self._pointers, self._wanted
        )

    def filled(self, rows: Sequence[Row]) -> Batch:
        for index, row in enumerate(rows):
            self._token[index], self._position[index] = row.token, row.position
            self._slots[index][0], self._wanted[index] = row.slot, row.wanted
        self._batch.n_tokens = len(rows)
        return self._batch
