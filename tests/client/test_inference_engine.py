"""The engine of llama.cpp: each adapter answers as itself, whatever else happens meanwhile."""

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from fedpeft.adapters import AdapterState, save_adapter
from fedpeft.errors import (
    BadRequest,
    FingerprintMismatch,
    InferenceError,
    ModelError,
    PromptTooLong,
    UnknownAdapter,
)
from fedpeft_client.inference.catalogue import BASE, Catalogue
from fedpeft_client.inference.engine import Answer, Engine, Piece, Sampling
from fedpeft_client.inference.llama_engine import LlamaEngine, LlamaLimits
from fedpeft_client.inference.prepared import Prepared, Workshop
from fedpeft_client.inference.transformers_engine import TransformersEngine
from tests.client.inference_boxes import EMBEDDED, LORA, adapter_values, stock_adapter

ROUNDS = (2, 3, 5)
PROMPT = "The patient"
LONG = Sampling(max_tokens=200)
SHORT = Sampling(max_tokens=24)


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Stock PEFT directories by the names of their versions."""
    folder = tmp_path_factory.mktemp("stock")
    return {f"round-{seed}": stock_adapter(folder / str(seed), seed) for seed in ROUNDS}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(
        directory=tmp_path_factory.mktemp("inference"),
        base=EMBEDDED,
        quantisation="f32",
        expected=None,
        tell=lambda _: None,
    )


@pytest.fixture(scope="module")
def files(workshop: Workshop, stock: dict[str, Path]) -> Prepared:
    return workshop.prepare(Catalogue(default="round-2", adapters=stock))


class Shelf:
    """The files as they are at the moment; a test may change them."""

    def __init__(self, files: Prepared) -> None:
        self.files = files

    def __call__(self) -> Prepared:
        return self.files

    def drop(self, name: str) -> None:
        rest = {it: path for it, path in self.files.adapters.items() if it != name}
        self.files = dataclasses.replace(self.files, adapters=rest, default=None)


Start = Callable[..., LlamaEngine]


@pytest.fixture
def start(files: Prepared) -> Iterator[Start]:
    """Start an engine: ``start(shelf=, parallel=)``."""
    engines: list[LlamaEngine] = []

    def begin(shelf: Callable[[], Prepared] | None = None, *, parallel: int = 4) -> LlamaEngine:
        limits = LlamaLimits(context=256, parallel=parallel, threads=1)
        engines.append(LlamaEngine(shelf or Shelf(files), limits, description="for tests"))
        return engines[-1]

    yield begin
    for engine in engines:
        engine.close()


@pytest.fixture(scope="module")
def alone(files: Prepared) -> Callable[..., str]:
    """What a fresh engine answers that was asked nothing else."""
    known: dict[tuple[Any, ...], str] = {}

    def answer(model: str, prompt: str = PROMPT, options: Sampling = LONG) -> str:
        key = (model, prompt, options)
        if key not in known:
            limits = LlamaLimits(context=256, parallel=1, threads=1)
            engine = LlamaEngine(lambda: files, limits, description="fresh")
            known[key] = text_of(engine.complete(prompt, model=model, options=options))
            engine.close()
        return known[key]

    return answer


def shared(one: str, other: str) -> int:
    """Return how many characters two texts have in common at their beginning."""
    differing = (at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differing, min(len(one), len(other)))


def text_of(answer: Answer) -> str:
    return "".join(piece.text for piece in answer)


def begun(answer: Answer) -> str:
    """Wait for the first text of an answer, so that it is certainly running."""
    return next(piece.text for piece in answer if piece.text)


# What is refused


def test_an_unknown_adapter_is_refused(start: Start):
    with pytest.raises(UnknownAdapter, match=r"no adapter 'round-9' that can answer"):
        start().complete(PROMPT, model="round-9", options=SHORT)


def test_an_adapter_of_another_base_is_refused_by_name_and_the_rest_answers(
    workshop: Workshop, stock: dict[str, Path], tmp_path: Path, start: Start
):
    own = adapter_values(1)
    schema = dataclasses.replace(own.schema, fingerprint="f" * 64)
    save_adapter(AdapterState(schema, own.values), LORA, tmp_path / "other", base_name="other")
    wrong = Catalogue(default="round-2", adapters={**stock, "round-1": tmp_path / "other"})
    engine = start(lambda: workshop.prepare(wrong))

    with pytest.raises(UnknownAdapter, match=r"round-1 cannot be used: .*base model"):
        engine.complete(PROMPT, model="round-1", options=SHORT)
    assert text_of(engine.complete(PROMPT, options=SHORT))


def test_a_truncated_base_is_refused_before_it_is_mapped(files: Prepared, tmp_path: Path):
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(files.base.read_bytes()[:-4096])
    workshop = Workshop(
        directory=tmp_path, base=cut, quantisation="f32", expected=None, tell=lambda _: None
    )

    with pytest.raises(ModelError, match=r"cut\.gguf"):
        workshop.prepare(Catalogue())


def test_a_base_that_the_box_did_not_agree_to_is_refused(workshop: Workshop):
    other = dataclasses.replace(workshop, expected="0" * 64)

    with pytest.raises(FingerprintMismatch, match=r"model\.fingerprint"):
        other.prepare(Catalogue())


def test_a_prompt_beyond_the_context_is_refused_with_both_numbers(start: Start):
    with pytest.raises(PromptTooLong, match=r"prompt has \d{3,} tokens and the context 256"):
        start().complete("tablet " * 300, options=SHORT)


def test_a_prompt_beyond_the_context_is_cut_only_when_that_is_asked_for(start: Start):
    options = dataclasses.replace(SHORT, cut_prompt=True)
    engine = start()
    turns = [{"role": "user", "content": "tablet " * 40}, {"role": "assistant", "content": "no"}]

    text = list(engine.complete("tablet " * 300, options=options))[-1].usage
    chat = list(engine.chat([*turns * 9, turns[0]], options=options))[-1].usage

    assert text is not None and text.prompt == 192
    assert chat is not None and 41 < chat.prompt <= 192


@pytest.mark.parametrize(
    "values",
    [
        {"max_tokens": 0},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"seed": -1},
        {"stop": ("",)},
    ],
)
def test_values_outside_of_their_range_are_refused(values: dict[str, Any]):
    with pytest.raises(BadRequest, match=next(iter(values))):
        Sampling(**values)


def test_a_conversation_that_cannot_be_written_is_refused_without_quoting_it(start: Start):
    engine = start()
    for messages in ([], [{"role": "nurse", "content": "secret"}], [{"role": "user"}]):
        with pytest.raises(BadRequest) as refused:
            engine.chat(messages, options=SHORT)
        assert "secret" not in str(refused.value)


@pytest.mark.parametrize("text", ["half a character: \ud83d", "bytes of Latin-1: \udcfc"])
def test_a_text_that_is_no_unicode_is_refused(start: Start, text: str):
    engine = start()

    with pytest.raises(BadRequest, match="no valid Unicode"):
        engine.chat([{"role": "user", "content": text}], options=SHORT)
    with pytest.raises(BadRequest, match="no valid Unicode"):
        engine.complete(text, options=SHORT)


def test_a_closed_engine_refuses_and_running_answers_end_with_an_error(start: Start):
    engine = start()
    running = engine.complete(PROMPT, options=LONG)
    begun(running)
    engine.close()

    with pytest.raises(InferenceError, match="stopped"):
        text_of(running)
    with pytest.raises(InferenceError, match="stopped"):
        engine.complete(PROMPT, options=SHORT)


# What answers


def test_both_engines_say_the_same(start: Start, stock: dict[str, Path], alone: Callable[..., str]):
    reference = TransformersEngine(
        EMBEDDED,
        lambda: Catalogue(default="round-2", adapters=stock),
        context=256,
        dtype="float32",
        description="reference",
    )
    turns = [{"role": "user", "content": "What is the dose of Levothyroxine?"}]
    engines: tuple[Engine, ...] = (start(), reference)
    told = [
        [text_of(engine.chat(turns, model=model, options=SHORT)) for model in engine.models()]
        + [
            text_of(engine.complete(PROMPT, model=model, options=SHORT))
            for model in engine.models()
        ]
        for engine in engines
    ]
    reference.close()

    assert told[0] == told[1]
    assert len(set(told[0])) >= 6


def test_a_prompt_cached_under_one_adapter_is_never_reused_under_another(
    start: Start, alone: Callable[..., str]
):
    engine = start(parallel=1)
    order = ["round-2", "round-3", BASE, "round-3", "round-2", "round-2", BASE, "round-5"]

    for model in order:
        assert text_of(engine.complete(PROMPT, model=model, options=LONG)) == alone(model)


def test_the_same_prompt_under_the_same_adapter_is_not_read_again(start: Start):
    engine = start(parallel=1)
    prompt = "The patient takes one tablet in the morning and"
    first, second, other = (
        list(engine.complete(prompt, model=model, options=SHORT))[-1].usage
        for model in ("round-2", "round-2", "round-3")
    )

    assert first is not None and second is not None and other is not None
    assert (first.cached, second.cached, other.cached) == (0, first.prompt - 1, 0)


def test_adapters_that_answer_at_the_same_time_answer_as_if_they_were_alone(
    start: Start, alone: Callable[..., str]
):
    engine = start(parallel=3)
    models = [BASE, "round-2", "round-3", "round-5"] * 3

    def ask(model: str) -> str:
        return text_of(engine.complete(PROMPT, model=model, options=LONG))

    with ThreadPoolExecutor(len(models)) as pool:
        told = list(pool.map(ask, models))

    # Tokens of one adapter are computed together, which rounds otherwise than one by one, so
    # that far into an answer another word can win; no two adapters agree for nearly as long.
    pairs = [(text, alone(model)) for text, model in zip(told, models, strict=True)]
    assert all(text == own or shared(text, own) >= 60 for text, own in pairs)
    answers = {alone(model) for model in models}
    assert max(shared(one, other) for one, other in combinations(answers, 2)) < 30


def test_a_short_answer_does_not_wait_for_the_end_of_other_adapters_answers(start: Start):
    engine = start(parallel=4)
    ends: list[str] = []

    def ask(name: str, model: str, options: Sampling) -> None:
        while True:
            text_of(engine.complete(PROMPT, model=model, options=options))
            ends.append(name)
            if name == "short" or "short" in ends:
                return

    # The others begin anew until the short one is done: without turns it would never be.
    busy = [
        threading.Thread(target=ask, args=("long", "round-2", LONG), daemon=True) for _ in range(3)
    ]
    for thread in busy:
        thread.start()
    short = threading.Thread(target=ask, args=("short", "round-3", SHORT), daemon=True)
    short.start()
    short.join(60)

    assert not short.is_alive()
    for thread in busy:
        thread.join(60)


def test_the_same_seed_draws_the_same_answer_and_another_seed_another(start: Start):
    engine = start()

    def drawn(seed: int | None) -> str:
        options = Sampling(max_tokens=40, temperature=1.0, top_p=0.95, seed=seed)
        return text_of(engine.complete(PROMPT, model="round-2", options=options))

    assert drawn(5) == drawn(5)
    assert len({drawn(5), drawn(6), drawn(None), drawn(None)}) == 4


def test_an_answer_ends_before_a_stop_text(start: Start, alone: Callable[..., str]):
    whole = alone("round-5")
    stop = whole[30:34]
    options = Sampling(max_tokens=200, stop=(stop,))
    pieces = list(start().complete(PROMPT, model="round-5", options=options))

    assert "".join(piece.text for piece in pieces) == whole[: whole.index(stop)]
    assert pieces[-1].finished == "stop"


def test_an_answer_that_nobody_reads_any_more_frees_its_place(start: Start):
    engine = start(parallel=1)
    left = engine.complete(PROMPT, model="round-2", options=LONG)
    begun(left)
    queued = engine.complete(PROMPT, model="round-2", options=LONG)
    queued.close()
    left.close()

    assert list(queued) == []
    assert text_of(engine.complete(PROMPT, model="round-3", options=SHORT))


# Hot swap


def test_a_new_adapter_answers_without_disturbing_what_runs(
    files: Prepared, start: Start, alone: Callable[..., str]
):
    shelf = Shelf(files)
    shelf.drop("round-3")
    engine = start(shelf)
    running = engine.complete(PROMPT, model="round-2", options=LONG)
    text = begun(running)

    shelf.files = dataclasses.replace(files, default="round-3")
    engine.refresh()
    new = engine.complete(PROMPT, options=LONG)

    assert (new.model, engine.default) == ("round-3", "round-3")
    assert text_of(new) == alone("round-3")
    assert text + text_of(running) == alone("round-2")


def test_an_adapter_removed_while_it_answers_finishes_and_is_then_unknown(
    files: Prepared, start: Start, alone: Callable[..., str]
):
    shelf = Shelf(files)
    engine = start(shelf)
    running = engine.complete(PROMPT, model="round-3", options=LONG)
    text = begun(running)

    shelf.drop("round-3")
    engine.refresh()

    with pytest.raises(UnknownAdapter, match="'round-3'"):
        engine.complete(PROMPT, model="round-3", options=SHORT)
    assert text + text_of(running) == alone("round-3")
    assert engine.default == BASE
    engine.refresh()  # now that nothing uses it, it is unloaded
    assert text_of(engine.complete(PROMPT, model="round-2", options=LONG)) == alone("round-2")


def test_switching_among_adapters_takes_less_than_300_ms(start: Start):
    engine = start()
    for model in engine.models():
        text_of(engine.complete(PROMPT, model=model, options=SHORT))
    took: list[float] = []
    for model in engine.models() * 3:
        began = time.perf_counter()
        answer = engine.complete(PROMPT, model=model, options=SHORT)
        begun(answer)
        took.append(time.perf_counter() - began)
        answer.close()

    # The median: another program can take the processor away once in a while.
    assert sorted(took)[len(took) // 2] < 0.3


def test_the_base_model_is_in_memory_once_whatever_adapters_come_and_go(
    files: Prepared, start: Start
):
    shelf = Shelf(files)
    engine = start(shelf)
    for name in ROUNDS:
        shelf.files = dataclasses.replace(files, default=f"round-{name}")
        engine.refresh()
        text_of(engine.complete(PROMPT, options=SHORT))
    maps = Path("/proc/self/maps").read_text("utf-8")

    assert len({line.split()[4] for line in maps.splitlines() if files.base.name in line}) == 1
    assert maps.count(files.base.name) <= 3


# Files


def test_files_are_converted_once_and_damaged_ones_anew(
    workshop: Workshop, stock: dict[str, Path], tmp_path: Path
):
    told: list[str] = []
    own = dataclasses.replace(workshop, directory=tmp_path, tell=told.append)
    catalogue = Catalogue(default="round-2", adapters=stock)
    first = own.prepare(catalogue)
    times = {path: path.stat().st_mtime_ns for path in first.adapters.values()}
    path = first.adapters["round-2"]
    path.write_bytes(path.read_bytes()[:200])
    second = own.prepare(catalogue)

    assert second == first
    assert [it for it in times if it.stat().st_mtime_ns != times[it]] == [path]
    assert told[-1].startswith(f"{path} is damaged")
    assert sum("converting the base model" in line for line in told) == 1


def test_files_of_which_some_bytes_were_changed_are_made_anew(
    workshop: Workshop, stock: dict[str, Path], tmp_path: Path
):
    told: list[str] = []
    own = dataclasses.replace(workshop, directory=tmp_path, tell=told.append)
    catalogue = Catalogue(default="round-2", adapters=stock)
    first = own.prepare(catalogue)
    changed = (first.base, first.adapters["round-2"])
    before = [path.read_bytes() for path in changed]
    for path, content in zip(changed, before, strict=True):
        path.write_bytes(content[:-64] + b"\xff" * 64)

    assert own.prepare(catalogue) == first
    assert [path.read_bytes() for path in changed] == before
    assert sum("is damaged and is made anew" in line for line in told) == len(changed)


def test_files_of_versions_that_are_gone_are_removed(
    workshop: Workshop, stock: dict[str, Path], tmp_path: Path
):
    own = dataclasses.replace(workshop, directory=tmp_path)
    own.prepare(Catalogue(adapters=stock))
    left = own.prepare(Catalogue(adapters={"round-2": stock["round-2"]}))

    (path,) = left.adapters.values()
    assert set((tmp_path / "adapters").iterdir()) == {path, path.with_suffix(".sha256")}


def test_the_base_model_in_an_encoding_of_before_is_removed(workshop: Workshop, tmp_path: Path):
    before = dataclasses.replace(workshop, directory=tmp_path).prepare(Catalogue())
    after = dataclasses.replace(workshop, directory=tmp_path, quantisation="q8_0")
    assert after.prepare(Catalogue()).base != before.base
    assert [*tmp_path.glob("*.gguf")] == [after.prepare(Catalogue()).base]


def test_a_version_that_got_other_weights_under_its_name_is_converted_anew(
    workshop: Workshop, tmp_path: Path, start: Start
):
    own = dataclasses.replace(workshop, directory=tmp_path / "inference")
    catalogue = Catalogue(default="round-1", adapters={"round-1": stock_adapter(tmp_path / "a", 2)})
    engine = start(lambda: own.prepare(catalogue))
    before = text_of(engine.complete(PROMPT, options=SHORT))
    stock_adapter(tmp_path / "a", 3)
    engine.refresh()

    assert text_of(engine.complete(PROMPT, options=SHORT)) != before


def test_pieces_together_are_the_answer_and_the_last_one_says_what_it_took(start: Start):
    pieces: list[Piece] = list(start().complete(PROMPT, model="round-2", options=SHORT))

    assert [piece.finished for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].finished == "length"
    assert pieces[-1].usage is not None and pieces[-1].usage.answer == 24
