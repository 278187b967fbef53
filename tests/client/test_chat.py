"""Answers at a terminal: talks, batches that go on, and versions side by side, from a real box."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from fedpeft.adapters import AdapterState
from fedpeft.config import AdapterSettings
from fedpeft.errors import DataError, FedpeftError, PromptTooLong, StorageError, UnknownAdapter
from fedpeft.models import adapter_schema
from fedpeft_client.box import Box, open_box
from fedpeft_client.commands import chat as commands
from fedpeft_client.inference.answer_batch import AnswerFile, Asking, answers
from fedpeft_client.inference.conversation import Conversation, Terminal
from fedpeft_client.inference.engine import Engine, Sampling
from fedpeft_client.inference.opening import open_engine
from fedpeft_client.inference.questions import Question, question_of, read_questions
from fedpeft_client.settings import (
    BoxModelSettings,
    ClientSettings,
    DataSettings,
    InferenceSettings,
    ServerSettings,
    settings_toml,
)
from fedpeft_client.versions.acceptance import Verdict
from fedpeft_client.versions.version import Arrival

SHORT = Sampling(max_tokens=8)
SECRET = "Zebra 4711"
LORA = AdapterSettings(rank=4, alpha=8.0)


def make_box(directory: Path, model: Path) -> Path:
    """A box with the rounds 1 and 2, of which the first is in use."""
    directory.mkdir()
    settings = ClientSettings(
        clinic="anna",
        server=ServerSettings(address="localhost:1", federation="sea"),
        model=BoxModelSettings(directory=model, dtype="float32"),
        data=DataSettings(train=Path("train.jsonl")),
        inference=InferenceSettings(context=256),
    )
    (directory / "client.toml").write_text(settings_toml(settings), "utf-8")
    for name in ("identity.key", "server.identity"):
        (directory / name).write_text("not needed to answer\n")
    schema = adapter_schema(model, LORA)
    store = open_box(directory).adapter_store
    for number in (1, 2):
        values = torch.randn(schema.numel, generator=torch.Generator().manual_seed(number)) * 0.2
        verdict = Verdict(accepted=number == 1, reason="test", rival="base")
        store.keep(
            Arrival(
                state=AdapterState(schema, values),
                settings=LORA,
                base_name=str(model),
                federation="sea",
                run="1" * 32,
                round=number,
            ),
            verdict,
        )
    return directory


@pytest.fixture(scope="module")
def directory(embedded_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_box(tmp_path_factory.mktemp("home") / "box", embedded_model)


@pytest.fixture(scope="module")
def box(directory: Path) -> Box:
    return open_box(directory)


@pytest.fixture(scope="module")
def engine(box: Box) -> Iterator[Engine]:
    engine = open_engine(box, box.adapter_store.catalogue, lambda _: None)
    yield engine
    engine.close()


def talk(engine: Engine, *lines: str, model: str | None = None, options: Sampling = SHORT):
    """Hold a conversation of ``lines``; return what was shown and what was said."""
    waiting, shown, said = iter(lines), list[str](), list[str]()

    def ask() -> str:
        try:
            return next(waiting)
        except StopIteration:
            raise EOFError from None

    terminal = Terminal(ask=ask, show=shown.append, say=said.append)
    held = Conversation(engine, terminal, options, model)
    held.hold()
    return "".join(shown), said, held._turns


# chat


def test_each_answer_says_which_version_it_is_of(engine: Engine):
    shown, said, turns = talk(engine, "What is a cat?", "", "/model base", "What is a cat?")
    assert said == [
        "round-1 answers",
        "base answers from now on, with the conversation so far",
        "base answers",
    ]
    assert [turn["role"] for turn in turns] == ["user", "assistant", "user", "assistant"]
    assert turns[1]["content"] + " [...]\n" in shown or turns[1]["content"] + "\n" in shown


def test_a_later_turn_is_answered_with_what_was_said_before(engine: Engine):
    alone = talk(engine, "Which tablets?")[2][-1]
    turns = talk(engine, "I take Amoxil.", "Which tablets?")[2]
    direct = "".join(piece.text for piece in engine.chat(turns[:3], model="round-1", options=SHORT))
    assert turns[3]["content"] == direct
    assert len(turns) == 4
    assert alone["content"] == talk(engine, "x", "/reset", "Which tablets?")[2][-1]["content"]


def test_an_unknown_model_or_command_changes_nothing(engine: Engine):
    _, said, turns = talk(engine, "/model round-9", "/model", "/help", "hello", "/end", "never")
    assert said[0] == said[1] == "choose one of base, round-1, round-2, as in: /model base"
    assert said[2].startswith("/reset begins anew")
    assert said[3] == "round-1 answers"
    assert len(said) == 4
    assert turns[0]["content"] == "hello"


def test_what_is_too_long_is_refused_with_the_numbers_and_the_talk_goes_on(engine: Engine):
    _, said, turns = talk(engine, "word " * 2000, "hello")
    assert "256" in said[0]
    assert said[0].endswith("(/reset begins anew)")
    assert turns[0]["content"] == "hello"


@pytest.fixture
def ctrl_c():
    """Ctrl-C as at a terminal: several test processes at once ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_stops_the_answer_and_once_more_ends(engine: Engine):
    shown, said, lines = list[str](), list[str](), iter(["hello", "again"])

    def show(text: str) -> None:
        shown.append(text)
        if len(shown) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    def ask() -> str:
        for line in lines:
            if line == "again":
                os.kill(os.getpid(), signal.SIGINT)
            return line
        raise AssertionError

    terminal = Terminal(ask=ask, show=show, say=said.append)
    held = Conversation(engine, terminal, Sampling(max_tokens=200))
    with pytest.raises(KeyboardInterrupt):
        held.hold()
    assert said == ["round-1 answers", "stopped; Ctrl-C again ends"]
    assert [turn["role"] for turn in held._turns] == ["user", "assistant"]
    assert len(shown) < 10


# Questions


@pytest.mark.parametrize(
    "line",
    [
        f'{{"prompt": "{SECRET}"',
        f'["{SECRET}"]',
        f'{{"text": "{SECRET}"}}',
        f'{{"prompt": "{SECRET}", "question": "{SECRET}"}}',
        '{"prompt": ""}',
        '{"prompt": 7}',
        '{"messages": []}',
        f'{{"messages": [{{"role": "user", "content": ["{SECRET}"]}}]}}',
        f'{{"messages": [{{"role": "assistant", "content": "{SECRET}"}}]}}',
        "[" * 200_000,
    ],
)
def test_a_line_that_is_no_question_is_named_and_not_quoted(line: str, tmp_path: Path):
    file = tmp_path / "questions.jsonl"
    file.write_text('{"prompt": "fine"}\n\n' + line + "\n", "utf-8")
    with pytest.raises(DataError, match=r"line 3 of .*questions\.jsonl is no question") as refused:
        read_questions(file)
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xff\xfe\xff", None])
def test_a_file_without_questions_is_refused(content: bytes | None, tmp_path: Path):
    file = tmp_path / "questions.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DataError, match=r"questions\.txt"):
        read_questions(file)


def test_questions_are_read_from_lines_and_from_json(tmp_path: Path):
    lines, rows = tmp_path / "q.txt", tmp_path / "q.jsonl"
    lines.write_text('one\n\n{"prompt": "two"}\n', "utf-8")
    assert [(q.number, q.text) for q in read_questions(lines)] == [
        (1, "one"),
        (3, '{"prompt": "two"}'),
    ]
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    content = [{"prompt": "one"}, {"question": "two", "id": 7}, {"messages": turns}]
    rows.write_text("".join(json.dumps(row) + "\n" for row in content), "utf-8")
    found = read_questions(rows)
    assert [question.text for question in found] == ["one", "two", "c"]
    rows.write_text('{"prompt": "a\u2028b\u0085c"}\r\n{"prompt": "d"}', "utf-8")
    assert [question.text for question in read_questions(rows)] == ["a\u2028b\u0085c", "d"]
    assert list(found[2].messages) == turns


def test_a_json_array_holds_questions_as_texts_or_objects(tmp_path: Path):
    file = tmp_path / "q.json"
    turns = [{"role": "user", "content": "c"}]
    rows = ["one", {"prompt": "two"}, {"messages": turns}]
    file.write_text(json.dumps(rows, indent=2), "utf-8")
    found = read_questions(file)
    assert [(q.number, q.text) for q in found] == [(1, "one"), (2, "two"), (3, "c")]


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("", "no JSON array of questions"),
        ("[]", "no JSON array of questions"),
        (f'{{"prompt": "{SECRET}"}}', "no JSON array of questions"),
        (f'{{"prompt": "{SECRET}"}}\n{{"prompt": "b"}}', "whose name ends with .jsonl"),
        ("[" * 200_000, "no JSON array of questions"),
        (f'["fine", {{"text": "{SECRET}"}}]', "entry 2 of .* is no question"),
        ('["fine", " "]', "entry 2 of .* is no question"),
        ('["fine", ["x"]]', "entry 2 of .* is no question"),
    ],
)
def test_a_json_file_of_something_else_says_what_is_expected(
    content: str, named: str, tmp_path: Path
):
    file = tmp_path / "q.json"
    file.write_text(content, "utf-8")
    with pytest.raises(DataError, match=named) as refused:
        read_questions(file)
    assert SECRET not in str(refused.value)


# A batch


QUESTIONS = [question_of(f"What is {name}?", at) for at, name in enumerate("abcd", 1)]
ASKING = Asking(model="round-1", options=SHORT)


def fill(engine: Engine, file: Path, asking: Asking = ASKING, up_to: int = 4) -> int:
    kept = AnswerFile(file)
    left = kept.left(QUESTIONS, asking)[:up_to]
    for answered in answers(engine, left, asking, parallel=2):
        kept.add(answered)
    return len(left)


def test_answers_come_in_order_and_are_those_of_each_question_alone(engine: Engine):
    found = list(answers(engine, QUESTIONS, ASKING, parallel=3))
    assert [row["number"] for row in found] == [1, 2, 3, 4]
    for row, question in zip(found, QUESTIONS, strict=True):
        assert row["answer"] == ASKING.one(engine, question)["answer"]
        assert (row["model"], row["schema"]) == ("round-1", 1)
        assert 0 < (row["answer_tokens"] or 0) <= 8


def test_a_question_that_cannot_be_answered_ends_the_batch_after_those_before_it(engine: Engine):
    long = [QUESTIONS[0], question_of(f"{SECRET} " * 500, 2), QUESTIONS[2]]
    found: list[int] = []
    with pytest.raises(PromptTooLong, match="question 2: ") as refused:
        found.extend(row["number"] for row in answers(engine, long, ASKING, parallel=2))
    assert SECRET not in str(refused.value)


def test_the_oldest_turns_are_left_out_only_if_that_is_asked_for(engine: Engine):
    turns = [{"role": role, "content": "word " * 40} for role in ("user", "assistant") * 5]
    long = Question(1, (*turns, {"role": "user", "content": "What is a cat?"}))
    with pytest.raises(PromptTooLong, match=r"question 1: .* the context 256"):
        ASKING.one(engine, long)
    cut = Asking(model="round-1", options=Sampling(max_tokens=4, cut_prompt=True))
    assert 0 < (cut.one(engine, long)["prompt_tokens"] or 0) < 256


def test_a_batch_goes_on_where_it_stopped_and_gives_the_same(engine: Engine, tmp_path: Path):
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    assert fill(engine, whole) == 4
    assert fill(engine, parts, up_to=2) == 2
    with parts.open("ab") as file:
        file.write(b'{"schema": 1, "number": 3, "mod')  # a kill while the third was written
    assert fill(engine, parts) == 2
    assert fill(engine, parts) == 0
    assert parts.read_bytes() == whole.read_bytes()
    assert parts.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("asking", "told"),
    [
        (Asking(model="round-2", options=SHORT), "was begun with round-1 and other options"),
        (Asking(model="round-1", options=Sampling(max_tokens=9)), "other options"),
    ],
)
def test_answers_of_two_versions_are_not_mixed_in_one_file(
    asking: Asking, told: str, engine: Engine, tmp_path: Path
):
    file = tmp_path / "out.jsonl"
    fill(engine, file, up_to=1)
    with pytest.raises(StorageError, match=told):
        AnswerFile(file).left(QUESTIONS, asking)


@pytest.mark.parametrize("content", ["notes\n", "notes", '{"schema": 1}\n', "[1]\n"])
def test_a_file_of_something_else_is_not_written_to(content: str, tmp_path: Path):
    file = tmp_path / "notes.txt"
    file.write_text(content)
    with pytest.raises(StorageError, match="something else than answers"):
        AnswerFile(file).left(QUESTIONS, ASKING)
    assert file.read_text() == content


def test_answers_to_other_questions_are_refused(engine: Engine, tmp_path: Path):
    file = tmp_path / "out.jsonl"
    fill(engine, file, up_to=2)
    kept = AnswerFile(file)
    other = [QUESTIONS[0], question_of("What is z?", 2)]
    with pytest.raises(StorageError, match="answers another question 2"):
        kept.left(other, ASKING)
    with pytest.raises(StorageError, match="2 answers where there are 1 questions"):
        kept.left(QUESTIONS[:1], ASKING)


# The commands


def run(*arguments: Any, text: str | None = None):
    return CliRunner().invoke(commands.app, [str(each) for each in arguments], input=text)


def failure(*arguments: Any) -> FedpeftError:
    error = run(*arguments).exception
    assert isinstance(error, FedpeftError)
    return error


def test_generate_wants_one_source_of_questions(directory: Path, tmp_path: Path):
    assert run("generate", directory).exit_code == 2
    assert run("generate", directory, "--prompt", "a", "--file", tmp_path / "x").exit_code == 2
    assert isinstance(failure("generate", directory, "--prompt", " "), DataError)


def test_an_unknown_model_is_refused_before_anything_is_answered(directory: Path):
    error = failure("generate", directory, "--prompt", SECRET, "--model", "round-9")
    assert isinstance(error, UnknownAdapter)
    assert str(error).endswith("choose one of base, round-1, round-2 with --model")
    assert SECRET not in str(error)
    assert isinstance(
        failure("compare", directory, "--prompt", SECRET, "--model", "round-9"), UnknownAdapter
    )


def test_where_answers_cannot_be_written_is_told_before_the_model_is_loaded(tmp_path: Path):
    box = tmp_path / "no-box"  # so whatever loads it fails in another way
    for out in (tmp_path, tmp_path / "no-folder" / "a.jsonl"):
        error = failure("generate", box, "--prompt", SECRET, "--out", out)
        assert isinstance(error, StorageError)
        assert f"cannot write {out}: " in str(error)
    good = tmp_path / "a.jsonl"
    assert not isinstance(failure("generate", box, "--prompt", "x", "--out", good), StorageError)
    assert not good.exists()


def test_generate_answers_for_programs_and_for_people(directory: Path, engine: Engine):
    expected = Asking(model="round-1", options=SHORT).one(engine, question_of("What is a cat?"))
    arguments = ("generate", directory, "--prompt", "What is a cat?", "--max-tokens", 8)
    assert run(*arguments).stdout == f"{expected['answer']}\n\n"
    row = json.loads(run(*arguments, "--json").stdout)
    assert row == json.loads(json.dumps(expected))
    other = json.loads(run(*arguments, "--json", "--model", "base").stdout)
    assert other["model"] == "base"
    assert other["answer"] != row["answer"]


def test_generate_writes_questions_and_answers_only_where_asked(directory: Path, tmp_path: Path):
    file, out = tmp_path / "q.txt", tmp_path / "a.jsonl"
    file.write_text(f"{SECRET}?\nWhat is a cat?\n", "utf-8")
    before = {path for path in directory.rglob("*") if path.is_file()}
    done = run("generate", directory, "--file", file, "--out", out, "--max-tokens", 4)
    assert done.exit_code == 0
    assert done.stdout == ""
    assert SECRET not in done.stderr
    assert [json.loads(line)["number"] for line in out.read_text().splitlines()] == [1, 2]
    assert SECRET in out.read_text()
    again = run("generate", directory, "--file", file, "--out", out, "--max-tokens", 4)
    assert "2 answers are in" in again.stderr.replace("\n", " ")
    for path in directory.rglob("*"):
        if path.is_file():
            assert SECRET.encode() not in path.read_bytes()
    assert {path for path in directory.rglob("*") if path.is_file()} == before


def test_compare_shows_base_in_use_and_newest_side_by_side(directory: Path):
    arguments = ("compare", directory, "--prompt", "What is a cat?", "--max-tokens", 6)
    row = json.loads(run(*arguments, "--json").stdout)
    assert list(row["answers"]) == ["base", "round-1", "round-2"]
    assert len(set(row["answers"].values())) > 1
    shown = run(*arguments).stdout
    heading = next(line for line in shown.splitlines() if "base" in line)
    assert "round-1" in heading
    assert "round-2" in heading
    chosen = run(*arguments, "--json", "--model", "round-2", "--model", "base").stdout
    assert list(json.loads(chosen)["answers"]) == ["round-2", "base"]


def test_chat_talks_over_stdin_and_stdout(directory: Path):
    done = run("chat", directory, "--max-tokens", 6, text="What is a cat?\n/model base\nAnd now?\n")
    assert done.exit_code == 0
    assert "a prompt and its answer may have 256 tokens together" in done.stderr
    assert "round-1 answers" in done.stderr
    assert "base answers from now on" in done.stderr
    assert len(done.stdout.strip().splitlines()) >= 2
    assert "cat" not in done.stderr
    assert isinstance(failure("chat", directory, "--model", "round-9"), UnknownAdapter)


def test_a_question_shows_no_text_when_it_is_printed():
    assert repr(Question(3, ({"role": "user", "content": SECRET},))) == (
        "Question(number=3, messages=1)"
    )
