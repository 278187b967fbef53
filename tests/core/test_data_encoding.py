"""Encoding: what is refused, which tokens are targets, and what truncation takes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.processors import ByteLevel as ByteLevelOffsets
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fedpeft.data import EncodedSet, Record, RecordSet, Turn, encode, read_records
from fedpeft.errors import ConfigError, DataError, ModelError

SHARED = Path(__file__).resolve().parents[2].parent / "shared"
STORIES = SHARED / "models" / "stories260k"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real model at {SHARED}")

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Like Llama 2 and Gemma: trims, writes BOS itself, refuses a system turn and wrong order.
STRICT = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) or m['role'] == 'system' %}"
    "{{ raise_exception('roles: ' + m['content']) }}{% endif %}"
    "{% if m['role'] == 'user' %}[Q] {{ m['content'] | trim }} [A]"
    "{% else %} {{ m['content'] | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)
# Like Qwen 3: an answer is written differently once another turn follows it.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if loop.last and m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_END = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
UPPER = "{% for m in messages %}{{ m['content'] | upper }}{{ eos_token }}{% endfor %}"


def byte_tokenizer(
    template: str | None = None, *, add_bos: bool = False, eos: bool = True
) -> PreTrainedTokenizerFast:
    """Build a tokenizer of single bytes, as GPT-2 spells them."""
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(special + alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = ByteLevelDecoder()
    backend.post_processor = ByteLevelOffsets(trim_offsets=True)
    if add_bos:
        backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>" if eos else None,
        extra_special_tokens=special[2:],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def stories() -> Any:
    return AutoTokenizer.from_pretrained(STORIES)


def record_set(records: Sequence[Record]) -> RecordSet:
    return RecordSet(tuple(records), "messages", Path("x.jsonl"), {}, None, "line", "chat")


def conversation(*texts: str, system: str | None = None) -> RecordSet:
    turns = [Turn("assistant" if index % 2 else "user", text) for index, text in enumerate(texts)]
    if system is not None:
        turns.insert(0, Turn("system", system))
    return record_set([Record(tuple(turns), 3, "p1", None)])


def plain(text: str) -> RecordSet:
    return record_set([Record((), 3, None, None, text)])


def target_runs(tokenizer: Any, encoded: EncodedSet) -> list[str]:
    """Decode each unbroken run of targets of the first example."""
    example = encoded.examples[0]
    edges = np.flatnonzero(np.diff(np.concatenate([[0], example.targets, [0]])))
    runs = [example.input_ids[a:b] for a, b in edges.reshape(-1, 2)]
    return [tokenizer.decode(run, clean_up_tokenization_spaces=False) for run in runs]


def whole(tokenizer: Any, encoded: EncodedSet) -> str:
    ids = encoded.examples[0].input_ids
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def test_max_length_that_leaves_nothing_to_predict_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_length is 1, which leaves no token to predict"):
        encode(plain("t"), byte_tokenizer(), max_length=1)


def test_slow_tokenizer_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(ModelError, match=r"not a fast one .* with a tokenizer\.json"):
        encode(plain("t"), Slow(), max_length=8)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("template", "records"), [(None, plain("t")), (NO_END, conversation("q", "a"))]
)
def test_tokenizer_that_cannot_say_stop_is_refused(
    template: str | None, records: RecordSet
) -> None:
    tokenizer = byte_tokenizer(template, eos=False)
    tokenizer.chat_template = NO_END
    with pytest.raises(ModelError, match=r"has no EOS token.*set eos_token"):
        encode(records, tokenizer, max_length=8)


@pytest.mark.parametrize("template", ["{{ nonsense.x.y }}", "{% if %}", "{{ messages + 1 }}"])
def test_broken_template_is_refused(template: str) -> None:
    with pytest.raises(ModelError, match="chat template cannot write a question and an answer"):
        encode(conversation("q", "a"), byte_tokenizer(template), max_length=8)


def refusal(records: RecordSet, template: str) -> str:
    with pytest.raises((DataError, ModelError)) as caught:
        encode(records, byte_tokenizer(template), max_length=64)
    assert caught.value.__context__ is None, "the template's error can quote the record"
    assert "SECRET" not in str(caught.value)
    return str(caught.value)


def test_template_without_system_role_is_said_to_have_none() -> None:
    message = refusal(conversation("q", "a", system="SECRET"), STRICT)
    assert message == (
        "cannot use x.jsonl line 3: the base model's chat template accepts no system turn: "
        "remove the system turns or choose another base model"
    )


def test_order_of_roles_that_the_template_refuses() -> None:
    turns = (Turn("user", "SECRET"), Turn("user", "SECRET"), Turn("assistant", "a"))
    message = refusal(record_set([Record(turns, 3, None, None)]), STRICT)
    assert "x.jsonl line 3: the base model's chat template refuses this order of roles" in message


def test_template_that_changes_answers_is_refused() -> None:
    message = refusal(conversation("q", "secret"), UPPER)
    assert "does not write every answer once and unchanged (seen at x.jsonl line 3)" in message


def test_text_of_which_nothing_is_left_is_refused() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Strip()
    with pytest.raises(DataError, match=r"x\.jsonl line 3: the tokenizer keeps nothing of its"):
        encode(plain(" "), tokenizer, max_length=8)


@needs_shared
def test_stories_answer_and_eos_are_targets(stories: Any) -> None:
    encoded = encode(conversation("Hello?", "A cat."), stories, max_length=99)
    assert target_runs(stories, encoded) == ["A cat.</s>"]
    assert whole(stories, encoded) == "<s> Question: Hello?\nAnswer: A cat.</s>"
    example = encoded.examples[0]
    assert (example.input_ids.dtype, example.targets.dtype) == (np.int32, np.bool_)
    assert (example.row, example.patient_id, example.truncated) == (3, "p1", False)
    assert list(example.input_ids).count(stories.bos_token_id) == 1


@needs_shared
def test_prompt_tokens_are_those_of_generation(stories: Any) -> None:
    messages = [{"role": "user", "content": "Hello?"}]
    text = stories.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    example = encode(conversation("Hello?", "A cat."), stories, max_length=99).examples[0]
    assert list(example.input_ids[~example.targets]) == stories(text)["input_ids"]


@needs_shared
def test_stories_every_answer_is_a_target(stories: Any) -> None:
    records = conversation("q1", "First.", "q2", "Second.", system="Be brief.")
    encoded = encode(records, stories, max_length=99)
    assert target_runs(stories, encoded) == ["First.</s>", "Second.</s>"]


@pytest.mark.parametrize(
    ("template", "answers", "runs"),
    [
        (None, ["a1", "a2"], [" a1</s>", " a2</s>"]),
        (CHATML, ["a1", " a 2 "], ["a1<|im_end|>", " a 2 <|im_end|>"]),
        (STRICT, ["a1", " a2\n"], [" a1 </s>", " a2 </s>"]),
        (
            THINKING,
            ["a1", "a2"],
            ["a1<|im_end|>", "<think>\n\n</think>\n\na2<|im_end|>"],
        ),
        (NO_END, ["a1", "a2"], ["assistant: a1", "assistant: a2</s>"]),
    ],
    ids=["none", "chatml", "strict", "thinking", "no-end"],
)
def test_targets_are_what_the_model_is_to_generate(
    template: str | None, answers: list[str], runs: list[str]
) -> None:
    tokenizer = byte_tokenizer(template)
    records = conversation("q1", answers[0], "q2", answers[1])
    assert target_runs(tokenizer, encode(records, tokenizer, max_length=512)) == runs


def test_fallback_template_is_the_documented_one() -> None:
    tokenizer = byte_tokenizer()
    encoded = encode(conversation("q1", "a1", "q2", "a2", system="s"), tokenizer, max_length=512)
    assert whole(tokenizer, encoded) == (
        "s\nQuestion: q1\nAnswer: a1</s>\nQuestion: q2\nAnswer: a2</s>"
    )


@pytest.mark.parametrize(
    ("template", "add_bos", "bos"),
    [(CHATML, False, 0), (CHATML, True, 1), (STRICT, False, 1), (STRICT, True, 1)],
)
def test_bos_is_never_doubled(template: str, add_bos: bool, bos: int) -> None:
    tokenizer = byte_tokenizer(template, add_bos=add_bos)
    ids = encode(conversation("q", "a"), tokenizer, max_length=64).examples[0].input_ids
    assert list(ids).count(tokenizer.bos_token_id) == bos
    assert bos == 0 or ids[0] == tokenizer.bos_token_id


@pytest.mark.parametrize("add_bos", [False, True])
def test_all_of_a_plain_text_is_a_target_but_its_first_token(add_bos: bool) -> None:
    tokenizer = byte_tokenizer(add_bos=add_bos)
    encoded = encode(plain("note"), tokenizer, max_length=64)
    assert whole(tokenizer, encoded) == ("<s>note</s>" if add_bos else "note</s>")
    assert not encoded.examples[0].targets[0]
    assert encoded.examples[0].targets[1:].all()


def test_question_equal_to_the_answer_is_no_target() -> None:
    tokenizer = byte_tokenizer(CHATML)
    encoded = encode(conversation("user", "user", "user", "user"), tokenizer, max_length=512)
    assert target_runs(tokenizer, encoded) == ["user<|im_end|>"] * 2


def test_placeholder_for_answers_may_occur_in_a_record() -> None:
    tokenizer = byte_tokenizer(CHATML)
    encoded = encode(conversation("\ue000", "\ue000\ue001"), tokenizer, max_length=512)
    assert target_runs(tokenizer, encoded) == ["\ue000\ue001<|im_end|>"]


def test_long_prompt_loses_its_beginning_but_not_bos() -> None:
    tokenizer = byte_tokenizer(STRICT)
    encoded = encode(conversation("0123456789", "abc"), tokenizer, max_length=16)
    assert whole(tokenizer, encoded) == "<s>56789 [A] abc </s>"
    assert (encoded.truncated, encoded.cut_tokens, encoded.tokens) == (1, 9, 16)


def test_long_answer_loses_its_end_and_the_stop() -> None:
    tokenizer = byte_tokenizer(STRICT)
    encoded = encode(conversation("q", "0123456789"), tokenizer, max_length=12)
    assert whole(tokenizer, encoded) == "<s>q [A] 01234"
    assert target_runs(tokenizer, encoded) == [" 01234"]


def test_long_prompt_and_answer_share_the_length() -> None:
    tokenizer = byte_tokenizer(STRICT)
    encoded = encode(conversation("q" * 50, "0123456789" * 5), tokenizer, max_length=13)
    assert whole(tokenizer, encoded) == "<s>q [A] 012345"
    assert encoded.target_tokens == 7


def test_long_conversation_keeps_the_last_answer() -> None:
    tokenizer = byte_tokenizer(CHATML)
    encoded = encode(conversation("q" * 50, "a" * 50, "q2", "the end"), tokenizer, max_length=64)
    assert target_runs(tokenizer, encoded)[-1] == "the end<|im_end|>"
    assert len(encoded.examples[0]) == 64


def test_plain_text_loses_its_end() -> None:
    tokenizer = byte_tokenizer(add_bos=True)
    assert whole(tokenizer, encode(plain("a note"), tokenizer, max_length=4)) == "<s>a n"


TEXTS = st.text(st.characters(codec="utf-8"), min_size=1)
TURNS = st.lists(st.tuples(TEXTS, TEXTS.filter(str.strip)), min_size=1, max_size=3)


def is_free_of_special_tokens(turns: list[tuple[str, str]]) -> bool:
    return not any(token in text for pair in turns for text in pair for token in ("<s>", "</s>"))


@pytest.mark.parametrize("template", [None, CHATML, THINKING])
@settings(max_examples=40, deadline=None)
@given(turns=TURNS.filter(is_free_of_special_tokens))
def test_targets_decode_to_any_answer(template: str | None, turns: list[tuple[str, str]]) -> None:
    tokenizer = byte_tokenizer(template)
    texts = [text for pair in turns for text in pair]
    encoded = encode(conversation(*texts), tokenizer, max_length=100_000)
    lead, end = (" ", "</s>") if template is None else ("", "<|im_end|>")
    expected = [lead + answer + end for _, answer in turns]
    if template == THINKING:
        expected[-1] = "<think>\n\n</think>\n\n" + expected[-1]
    assert target_runs(tokenizer, encoded) == expected


@needs_shared
@settings(max_examples=60, deadline=None)
@given(turns=TURNS.filter(is_free_of_special_tokens))
def test_targets_of_stories_decode_to_any_answer(turns: list[tuple[str, str]]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    texts = [text for pair in turns for text in pair]
    encoded = encode(conversation(*texts), tokenizer, max_length=100_000)
    # Decoding drops the space with which SentencePiece starts every text.
    assert target_runs(tokenizer, encoded) == [answer + "</s>" for _, answer in turns]


@pytest.mark.parametrize("template", [None, CHATML, STRICT, NO_END])
@settings(max_examples=60, deadline=None)
@given(turns=TURNS, max_length=st.integers(2, 80), add_bos=st.booleans())
def test_truncation_keeps_its_promises(
    template: str | None, turns: list[tuple[str, str]], max_length: int, add_bos: bool
) -> None:
    tokenizer = byte_tokenizer(template, add_bos=add_bos)
    records = conversation(*[text for pair in turns for text in pair])
    full = encode(records, tokenizer, max_length=100_000)
    cut = encode(records, tokenizer, max_length=max_length)
    example, before = cut.examples[0], full.examples[0]
    assert len(example) == min(max_length, len(before))
    assert example.targets.any()
    assert not example.targets[0]
    assert example.targets[-1]
    assert cut.cut_tokens == len(before) - len(example)
    assert cut.truncated == example.truncated == (len(before) > max_length)
    assert (cut.tokens, cut.target_tokens) == (len(example), example.targets.sum())
    has_bos = before.input_ids[0] == tokenizer.bos_token_id
    assert not has_bos or example.input_ids[0] == tokenizer.bos_token_id
    last_answer = int(np.argmin(before.targets[::-1]))
    kept_answer = int(np.argmin(example.targets[::-1]))
    assert kept_answer >= min(last_answer, max_length // 2)


def test_one_record_is_one_example_in_order() -> None:
    turns = (Turn("user", "q"), Turn("assistant", "a"))
    records = [
        Record(turns, row, f"p{row}", None) if row % 2 else Record((), row, None, None, "t" * row)
        for row in range(1, 601)
    ]
    encoded = encode(record_set(records), byte_tokenizer(), max_length=32)
    assert [example.row for example in encoded.examples] == list(range(1, 601))
    assert encoded.examples[0].patient_id == "p1"
    assert encoded.describe() == (
        f"600 examples, {encoded.tokens} tokens, {encoded.target_tokens} of them to be learnt; "
        f"{encoded.truncated} examples cut to 32 tokens, {encoded.cut_tokens} tokens lost"
    )


def test_nothing_printed_shows_ids_or_patient() -> None:
    encoded = encode(conversation("q", "a"), byte_tokenizer(), max_length=64)
    assert repr(encoded.examples[0]) == "EncodedExample(row=3, tokens=22, truncated=False)"
    assert repr(encoded).startswith("EncodedSet('1 example, 22 tokens, ")


@needs_shared
@pytest.mark.parametrize(
    ("file", "rows", "truncated"), [("ninds/train.jsonl", 930, 304), ("cdc/train.jsonl", 225, 115)]
)
def test_real_clinic_says_what_was_cut(stories: Any, file: str, rows: int, truncated: int) -> None:
    encoded = encode(read_records(SHARED / "data" / "clinics" / file), stories, max_length=512)
    assert (len(encoded), encoded.truncated) == (rows, truncated)
    assert max(len(example) for example in encoded.examples) == 512
