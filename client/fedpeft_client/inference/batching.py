"""Compute many answers at once on one model: the thread that owns it.

Requests begin in the order they came. Those of one adapter are decoded together, in one
step; where several adapters are asked for, they take turns by time, so that no request
waits for another one's end. Prompts are read in parts, so that running answers go on.

Must not know HTTP, names of models, or files of adapters.
"""

import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Final, TypeVar

from fedpeft.errors import FedpeftError, InferenceError
from fedpeft_client.inference.answers import QueuedAnswer
from fedpeft_client.inference.engine import Finish, Piece, Sampling, Usage
from fedpeft_client.inference.llama_model import BATCH_TOKENS, Adapter, LlamaModel, Row, Sampler
from fedpeft_client.inference.slots import Slot, place, to_empty
from fedpeft_client.inference.text_stream import TextStream

_TURN_S: Final = 0.2
"""How long one adapter's requests go on while another's wait: a change of adapter costs
some milliseconds."""
_PROMPT_PART: Final = 128
"""Tokens of prompts that are read in one step beside running answers, which wait for it."""

_Result = TypeVar("_Result")


@dataclass(eq=False)
class Request:
    """A prompt that was accepted; ``budget`` is the most tokens that its answer may have."""

    prompt: list[int]
    adapter: Adapter | None
    options: Sampling
    budget: int
    answer: QueuedAnswer
    text: TextStream = field(init=False)

    def __post_init__(self) -> None:
        self.text = TextStream(self.options.stop)

    @property
    def cells(self) -> int:
        """The room that it may take up in the context."""
        return len(self.prompt) + self.budget


@dataclass(eq=False)
class _Running:
    """A request in its slot. ``pending`` are tokens that are to be decoded next."""

    request: Request
    slot: Slot
    sampler: Sampler
    pending: list[int]
    cached: int
    produced: int = 0

    @property
    def reading(self) -> bool:
        return self.produced == 0


class Batcher:
    """Runs one :class:`LlamaModel` in a thread of its own until it is closed."""

    def __init__(self, model: LlamaModel, slots: int) -> None:
        self._model = model
        self._slots = [Slot(number) for number in range(slots)]
        self._running: list[_Running] = []
        self._waiting: deque[Request] = deque()
        self._calls: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._begun = 0
        self._turn: Adapter | None = None
        self._turn_ends = 0.0
        self._thread = threading.Thread(target=self._work, name="inference", daemon=True)
        self._thread.start()

    # Called by other threads.

    def submit(self, request: Request) -> None:
        """Take a request; its answer comes when its turn has come."""
        with self._wake:
            if self._closing:
                request.answer.fail()
                return
            self._waiting.append(request)
            self._wake.notify()

    def call(self, function: Callable[[], _Result]) -> _Result:
        """Run ``function``, which may use the model, between two steps; return its result.

        Raises:
            InferenceError: the batcher was closed.
        """
        future: Future[_Result] = Future()

        def run() -> None:
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        with self._wake:
            if self._closing:
                raise InferenceError("the engine was stopped: start it, and ask again")
            self._calls.append(run)
            self._wake.notify()
        return future.result()

    def drop(self, adapter: Adapter) -> None:
        """Forget prompts that were read under ``adapter``; to be called through :meth:`call`.

        Raises:
            InferenceError: requests still use it.
        """
        if self.uses(adapter):
            raise InferenceError(f"the adapter {adapter.name} still answers: wait for its end")
        for slot in self._slots:
            if slot.adapter is adapter:
                self._empty(slot)

    def uses(self, adapter: Adapter) -> bool:
        """Say whether requests use ``adapter``; to be called through :meth:`call`."""
        mine = [each.request for each in self._running] + list(self._waiting)
        return any(request.adapter is adapter for request in mine)

    def close(self) -> None:
        """End all answers, and wait for the thread; the model may then be freed."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    # In the thread.

    def _work(self) -> None:
        try:
            while self._wait_for_work():
                self._end_left()
                self._admit()
                if self._running:
                    self._step()
        finally:  # after a defect too: nobody may wait for ever
            self._end_all()

    def _end_all(self) -> None:
        with self._wake:
            self._closing = True
        for running in list(self._running):
            self._leave(running)
            running.request.answer.fail()
        for request in self._waiting:
            request.answer.fail()
        for run in self._calls:
            run()

    def _wait_for_work(self) -> bool:
        with self._wake:
            while not (self._closing or self._calls or self._waiting or self._running):
                self._wake.wait()
            if self._closing:
                return False
            calls, self._calls = self._calls, deque()
        for run in calls:
            run()
        return True

    def _end_left(self) -> None:
        """Stop what nobody waits for any more."""
        for running in [each for each in self._running if each.request.answer.closed]:
            self._leave(running)
        with self._wake:
            self._waiting = deque(each for each in self._waiting if not each.answer.closed)

    def _admit(self) -> None:
        while self._waiting:
            idle = [slot for slot in self._slots if not slot.reserved]
            if not idle:
                return
            request = self._waiting[0]
            slot, kept = place(idle, request.prompt, request.adapter)
            emptied = to_empty(self._slots, self._model.cells, request.cells, slot)
            if emptied is None:
                return  # the next ones wait too, or small ones would keep a large one out
            with self._wake:
                self._waiting.popleft()
            for other in emptied:
                self._empty(other)
            self._begin(request, slot, kept)

    def _begin(self, request: Request, slot: Slot, kept: int) -> None:
        if not kept or not self._model.forget(slot.number, kept):
            self._empty(slot)
            kept = 0
        del slot.tokens[kept:]
        self._begun += 1
        slot.adapter, slot.reserved, slot.used = request.adapter, request.cells, self._begun
        seed = request.options.seed
        sampler = self._model.sampler(
            request.options, secrets.randbits(32) if seed is None else seed
        )
        self._running.append(_Running(request, slot, sampler, request.prompt[kept:], kept))

    def _empty(self, slot: Slot) -> None:
        self._model.forget(slot.number, 0)
        slot.tokens.clear()
        slot.adapter = None

    def _leave(self, running: _Running) -> None:
        running.slot.reserved = 0
        running.sampler.close()
        self._running.remove(running)

    def _step(self) -> None:
        """Decode one batch of the adapter whose turn it is, and give out what came of it."""
        group = self._group()
        rows, wanted = _rows(group)
        try:
            done = self._model.decode(rows, self._turn)
            if not done:
                done = self._make_room() and self._model.decode(rows, self._turn)
            if not done:
                raise InferenceError("the context has no room left: ask again with less text")
            for running, index in wanted:
                self._advance(running, running.sampler.choose(index))
        except FedpeftError as error:
            for running in group:
                if running in self._running:
                    self._leave(running)
                    running.request.answer.fail(error)
                    self._empty(running.slot)

    def _group(self) -> list[_Running]:
        """Return the running requests of the adapter whose turn it is."""
        adapters = list(dict.fromkeys(each.request.adapter for each in self._running))
        now = time.monotonic()
        if self._turn not in adapters:
            self._turn, self._turn_ends = adapters[0], now + _TURN_S
        elif now >= self._turn_ends and len(adapters) > 1:
            following = (adapters.index(self._turn) + 1) % len(adapters)
            self._turn, self._turn_ends = adapters[following], now + _TURN_S
        return [each for each in self._running if each.request.adapter is self._turn]

    def _make_room(self) -> bool:
        """Empty idle slots: cells can be too scattered for a step although enough are free."""
        idle = [slot for slot in self._slots if not slot.reserved and slot.tokens]
        for slot in idle:
            self._empty(slot)
        return bool(idle)

    def _advance(self, running: _Running, token: int) -> None:
        """Add a token to an answer, and end the answer if that was the last one."""
        request, vocabulary = running.request, self._model.vocabulary
        running.produced += 1
        ended = vocabulary.ends(token)
        text = "" if ended else request.text.feed(vocabulary.piece(token))
        finished: Finish | None = None
        if ended or request.text.stopped:
            finished = "stop"
        elif running.produced >= request.budget:
            finished = "length"
        if finished is None:
            running.pending = [token]
            if text:
                request.answer.give(Piece(text))
            return
        usage = Usage(len(request.prompt), running.cached, running.produced)
        self._leave(running)
        request.answer.give(Piece(text + request.text.finish(), finished, usage))


def _rows(group: list[_Running]) -> tuple[list[Row], list[tuple[_Running, int]]]:
    """Return a batch, and whose next token is wanted after which of its rows.

    Answers first, a token each; then as much of the prompts as there is room for, in
    equal parts.
    """
    rows: list[Row] = []
    wanted: list[tuple[_Running, int]] = []
    reading = [each for each in group if each.reading]
    room = BATCH_TOKENS if len(reading) == len(group) else _PROMPT_PART
    room = min(room, BATCH_TOKENS - len(group))
    share = max(1, room // len(reading)) if reading else 0
    for running in sorted(group, key=lambda each: each.reading):
        part = running.pending[: share if running.reading else 1]
        del running.pending[: len(part)]
        start = len(running.slot.tokens)
        for offset, token in enumerate(part):
            last = not running.pending and offset == len(part) - 1
            rows.append(Row(token, running.slot.number, start + offset, last))
        running.slot.tokens.extend(part)
        if not running.pending:
            wanted.append((running, len(rows) - 1))
    return rows, wanted
