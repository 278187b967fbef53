"""The engine on a CPU: llama.cpp on a 4-bit base model with LoRA adapters beside it.

A new adapter is loaded into the running model in some milliseconds, so there is never
another copy of the base model. An adapter that was removed is unloaded when its last
answer is finished.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fedpeft.errors import FedpeftError, InferenceError, UnknownAdapter
from fedpeft_client.inference.answers import QueuedAnswer
from fedpeft_client.inference.batching import Batcher, Request
from fedpeft_client.inference.catalogue import BASE
from fedpeft_client.inference.chat_template import ChatTemplate
from fedpeft_client.inference.engine import Sampling
from fedpeft_client.inference.llama_model import Adapter, LlamaModel
from fedpeft_client.inference.prepared import Prepared
from fedpeft_client.inference.prompts import too_long, unknown
from fedpeft_client.inference.token_engine import TokenEngine

_MOST_LOADED: Final = 8
"""Adapters in memory; the one that was not asked for the longest goes when another comes."""


@dataclass(frozen=True, kw_only=True)
class LlamaLimits:
    """Tokens of a prompt and its answer together, answers at a time, CPU threads."""

    context: int
    parallel: int
    threads: int


class LlamaEngine(TokenEngine):
    """See :class:`fedpeft_client.inference.engine.Engine`."""

    def __init__(
        self,
        prepare: Callable[[], Prepared],
        limits: LlamaLimits,
        *,
        description: str,
    ) -> None:
        """Load the base model and the adapter in use.

        ``prepare`` returns the files as the box has them at that moment.

        Raises:
            ModelError: the base model cannot be loaded.
            InferenceError: there is not enough memory.
        """
        self.description = description
        self._prepare = prepare
        self._files = prepare()
        # A prompt may be as long as the context, and another one still find room beside it.
        cells = limits.context * min(limits.parallel, 2)
        self._model = LlamaModel(
            self._files.base, cells=cells, slots=limits.parallel, threads=limits.threads
        )
        self.context = min(limits.context, self._model.trained_context, self._model.cells)
        vocabulary = self._model.vocabulary
        template = ChatTemplate(vocabulary.template, bos=vocabulary.bos, eos=vocabulary.eos)
        super().__init__(template, vocabulary.eos)
        self._batcher = Batcher(self._model, limits.parallel)
        self._loaded: dict[Path, Adapter] = {}
        self._lock = threading.RLock()
        self._closed = False
        self._load_default()

    @property
    def default(self) -> str:
        """The version in use."""
        return self._files.default or BASE

    def models(self) -> tuple[str, ...]:
        """Return what can answer."""
        return (BASE, *self._files.adapters)

    def refresh(self) -> None:
        """Read the catalogue now, and load the adapter in use.

        Raises:
            FedpeftError: it cannot be read; what was there goes on.
        """
        files = self._prepare()
        with self._lock:
            if self._closed:
                return
            self._files = files
            self._unload({path for path in self._loaded if path not in files.adapters.values()})
            self._load_default()

    def close(self) -> None:
        """End running answers with an error and free the memory."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._batcher.close()
            self._model.close()

    def _tokens(self, text: str) -> list[int]:
        with self._lock:
            self._require_open()
            return self._model.vocabulary.tokens(text)

    def _begin(self, tokens: list[int], model: str | None, options: Sampling) -> QueuedAnswer:
        if len(tokens) >= self.context:
            raise too_long(len(tokens), self.context, cut=options.cut_prompt)
        left = self.context - len(tokens)
        budget = left if options.max_tokens is None else min(options.max_tokens, left)
        with self._lock:
            self._require_open()
            name = model if model is not None else self.default
            answer = QueuedAnswer(name)
            self._batcher.submit(Request(tokens, self._adapter(name), options, budget, answer))
        return answer

    def _require_open(self) -> None:
        if self._closed:
            raise InferenceError("the engine was stopped: start it, and ask again")

    def _adapter(self, name: str) -> Adapter | None:
        """Return an adapter, loaded; None is the base model."""
        if name == BASE:
            return None
        path = self._files.adapters.get(name)
        if path is None:
            raise unknown(name, self.models(), self._files.broken)
        found = self._loaded.pop(path, None)
        if found is None:
            spare = len(self._loaded) - _MOST_LOADED + 1
            self._unload(set(list(self._loaded)[: max(spare, 0)]))
            found = self._batcher.call(lambda: self._model.load_adapter(name, path))
        self._loaded[path] = found  # the last one of those in order is the latest asked for
        return found

    def _unload(self, paths: set[Path]) -> None:
        """Free adapters; one that still answers stays until the next time."""
        for path in paths:
            adapter = self._loaded[path]

            def free(adapter: Adapter = adapter) -> bool:
                if self._batcher.uses(adapter):
                    return False
                self._batcher.drop(adapter)
                self._model.free_adapter(adapter)
                return True

            if self._batcher.call(free):
                del self._loaded[path]

    def _load_default(self) -> None:
        if self._files.default is None:
            return
        try:
            self._adapter(self._files.default)
        except UnknownAdapter:
            return  # whoever asks for it is told why
        except FedpeftError as error:
            broken = {**self._files.broken, self._files.default: str(error)}
            adapters = dict(self._files.adapters)
            del adapters[self._files.default]
            self._files = Prepared(
                base=self._files.base,
                default=self._files.default,
                adapters=adapters,
                broken=broken,
            )
