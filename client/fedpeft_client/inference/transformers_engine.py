"""The engine on CUDA, and for what llama.cpp cannot run: transformers and PEFT.

The base model is loaded once, in 4-bit NF4 on CUDA and in full precision on a CPU, where
NF4 is many times slower. One answer is computed at a time, in the order they came, and
each begins without any cache; so nothing that was computed under one adapter is seen
under another one.
"""

import queue
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from fedpeft.adapters.peft_directory import recorded_base
from fedpeft.config import ComputeDtype
from fedpeft.errors import FedpeftError, InferenceError
from fedpeft.models import choose_device, choose_dtype, context_length, load_base
from fedpeft_client.inference.answers import QueuedAnswer
from fedpeft_client.inference.catalogue import BASE, Catalogue, Look
from fedpeft_client.inference.chat_template import ChatTemplate
from fedpeft_client.inference.engine import Finish, Piece, Sampling, Usage
from fedpeft_client.inference.prompts import too_long, unknown
from fedpeft_client.inference.text_stream import TextStream
from fedpeft_client.inference.token_engine import TokenEngine


@dataclass(frozen=True)
class _Task:
    tokens: list[int]
    path: Path | None
    options: Sampling
    budget: int
    answer: QueuedAnswer


class TransformersEngine(TokenEngine):
    """See :class:`fedpeft_client.inference.engine.Engine`."""

    def __init__(
        self, base: Path, look: Look, *, context: int, dtype: ComputeDtype, description: str
    ) -> None:
        """Load the base model.

        Raises:
            ModelError: it cannot be loaded.
        """
        self.description = description
        device = choose_device()
        self._base = load_base(
            base,
            quantization="nf4" if device.type == "cuda" else "none",
            dtype=choose_dtype(dtype, device),
            device=device,
        )
        self._base.network.eval()
        self.context = min(context, context_length(base) or context)
        self._tokenizer: Any = self._base.tokenizer
        end: str = self._tokenizer.eos_token or ""
        start: str = self._tokenizer.bos_token or ""
        super().__init__(ChatTemplate(self._tokenizer.chat_template, bos=start, eos=end), end)
        self._ends = self._end_tokens()
        self._look = look
        self._catalogue: Catalogue = look()
        self._adapted: PeftModel | None = None
        self._names: dict[Path, str] = {}
        self._lock = threading.Lock()
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="inference", daemon=True)
        self._thread.start()

    @property
    def default(self) -> str:
        """The version in use."""
        return self._catalogue.default or BASE

    def models(self) -> tuple[str, ...]:
        """Return what can answer."""
        return (BASE, *self._catalogue.adapters)

    def refresh(self) -> None:
        """Read the catalogue now; adapters are loaded when they are asked for."""
        self._catalogue = self._look()

    def close(self) -> None:
        """End running answers with an error and free the memory."""
        self._closed.set()
        self._tasks.put(None)
        self._thread.join()

    def _tokens(self, text: str) -> list[int]:
        # As in training: the template writes special tokens, BOS is added if it did not.
        tokens: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        first: list[int] = self._tokenizer("x", add_special_tokens=True)["input_ids"]
        bos = self._tokenizer.bos_token_id
        if bos is not None and first[0] == bos and tokens[:1] != [bos]:
            tokens.insert(0, bos)
        return tokens

    def _end_tokens(self) -> set[int]:
        settings: Any = self._base.network.generation_config
        ends: Any = settings.eos_token_id if settings is not None else None
        found: list[int | None] = [self._tokenizer.eos_token_id]
        found += ends if isinstance(ends, list) else [ends]
        return {each for each in found if each is not None}

    def _begin(self, tokens: list[int], model: str | None, options: Sampling) -> QueuedAnswer:
        if len(tokens) >= self.context:
            raise too_long(len(tokens), self.context, cut=options.cut_prompt)
        catalogue = self._catalogue
        name = model if model is not None else (catalogue.default or BASE)
        if name != BASE and name not in catalogue.adapters:
            raise unknown(name, self.models(), {})
        path = None if name == BASE else catalogue.adapters[name]
        if path is not None:
            self._require_same_base(name, path)
        left = self.context - len(tokens)
        budget = left if options.max_tokens is None else min(options.max_tokens, left)
        answer = QueuedAnswer(name)
        with self._lock:
            if self._closed.is_set():
                raise InferenceError("the engine was stopped: start it, and ask again")
            self._tasks.put(_Task(tokens, path, options, budget, answer))
        return answer

    def _require_same_base(self, name: str, path: Path) -> None:
        recorded = recorded_base(path)
        if recorded not in (None, self._base.fingerprint):
            why = (
                f"it was trained on base model {str(recorded)[:12]}, and this box has "
                f"{self._base.fingerprint[:12]}; choose another version"
            )
            raise unknown(name, self.models(), {name: why})

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            try:
                self._answer(task)
            except FedpeftError as error:
                task.answer.fail(error)
            except Exception as error:
                # torch raises many kinds; the next request must be answered all the same.
                failed = InferenceError(
                    f"the answer could not be computed ({type(error).__name__}): ask with less "
                    "text, or choose another version"
                )
                failed.__cause__ = error
                task.answer.fail(failed)
        with self._lock:
            while not self._tasks.empty():
                if (left := self._tasks.get()) is not None:
                    left.answer.fail()

    def _answer(self, task: _Task) -> None:
        network = self._network(task.path)
        text, ids = TextStream(task.options.stop), list[int]()
        shown = ""
        finished: Finish = "length"
        for token in self._generated(network, task):
            if self._closed.is_set():
                raise InferenceError("the engine was stopped: start it, and ask again")
            if task.answer.closed:
                return
            if token in self._ends:
                finished = "stop"
                ids.append(token)
                break
            ids.append(token)
            whole: str = self._tokenizer.decode(ids, skip_special_tokens=True)
            if not whole.endswith("\ufffd"):  # part of a character
                new, shown = whole[len(shown) :], whole
                if piece := text.feed(new.encode()):
                    task.answer.give(Piece(piece))
            if text.stopped:
                finished = "stop"
                break
        usage = Usage(len(task.tokens), 0, len(ids))
        task.answer.give(Piece(text.finish(), finished, usage))

    def _network(self, path: Path | None) -> Any:
        """Return the network with an adapter in it, or without one."""
        if path is None:
            bare: Any = self._adapted
            if bare is not None:
                bare.base_model.disable_adapter_layers()
            return self._base.network
        if path not in self._names:
            self._load(path, f"adapter{len(self._names)}")
        adapted: Any = self._adapted
        adapted.base_model.enable_adapter_layers()
        adapted.set_adapter(self._names[path])
        return adapted

    def _load(self, path: Path, name: str) -> None:
        network: Any = self._base.network
        try:
            with warnings.catch_warnings():
                # PEFT 0.21 asks by a name that transformers 5.23 calls deprecated.
                warnings.filterwarnings("ignore", ".*gradient_checkpointing.*", FutureWarning)
                if self._adapted is None:
                    self._adapted = PeftModel.from_pretrained(network, str(path), adapter_name=name)
                else:
                    self._adapted.load_adapter(str(path), name)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise InferenceError(
                f"the adapter in {path} cannot be loaded ({type(error).__name__}): choose another "
                "version"
            ) from error
        self._adapted.eval()
        self._names[path] = name

    def _generated(self, network: Any, task: _Task) -> Iterator[int]:
        device = self._base.network.device
        generator = torch.Generator(device)
        if task.options.seed is None:
            generator.seed()
        else:
            generator.manual_seed(task.options.seed)
        ids = torch.tensor([task.tokens], device=device)
        cache: Any = None
        for _ in range(task.budget):
            with torch.inference_mode():
                out = network(input_ids=ids, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                token = _chosen(out.logits[0, -1].float(), task.options, generator)
            yield token
            ids = torch.tensor([[token]], device=device)


def _chosen(logits: torch.Tensor, options: Sampling, generator: torch.Generator) -> int:
    """Return the next token: temperature first, then the likeliest of ``top_p``."""
    if options.temperature == 0:
        return int(logits.argmax())
    chances = torch.softmax(logits / options.temperature, dim=-1)
    if options.top_p < 1:
        ordered, places = chances.sort(descending=True)
        # What comes before a token decides, so the likeliest one always stays.
        ordered[ordered.cumsum(0) - ordered >= options.top_p] = 0
        return int(places[torch.multinomial(ordered, 1, generator=generator)])
    return int(torch.multinomial(chances, 1, generator=generator))
