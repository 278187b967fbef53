"""The commands ``chat``, ``generate`` and ``compare``: answers at a terminal, from this box."""

import contextlib
import json
import sys
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedpeft_client.commands.program import BoxDirectory, program

if TYPE_CHECKING:
    from fedpeft_client.box import Box
    from fedpeft_client.inference.answer_batch import Answered
    from fedpeft_client.inference.engine import Engine, Sampling
    from fedpeft_client.inference.questions import Question

app = typer.Typer()
_LONGEST = 512
"""Tokens of an answer, so that one that never ends does not fill a conversation's context."""
_Model = Annotated[
    str | None,
    typer.Option(help="base, or a name of `fedpeft-client adapters list`; default: the one in use"),
]
_MaxTokens = Annotated[int, typer.Option(help="the longest answer, in tokens")]
_Temperature = Annotated[float, typer.Option(help="0: always the likeliest token; up to 2")]
_Seed = Annotated[int | None, typer.Option(help="makes answers above temperature 0 repeat")]
_CutPrompt = Annotated[
    bool,
    typer.Option("--cut-prompt", help="leave out the oldest turns where the context is too short"),
]
_Prompt = Annotated[str | None, typer.Option(help="one question")]
_File = Annotated[
    Path | None,
    typer.Option(
        help="questions, one a line; JSON lines in a .jsonl file, a JSON array in a .json file"
    ),
]
_AsJson = Annotated[bool, typer.Option("--json", help="for programs: one object a line")]


@app.command()
def chat(
    directory: BoxDirectory = Path(),
    model: _Model = None,
    max_tokens: _MaxTokens = _LONGEST,
    temperature: _Temperature = 0.0,
    seed: _Seed = None,
    cut_prompt: _CutPrompt = False,
) -> None:
    """Talk with the adapter in use, or another one.

    Reads DIR and the base model; writes converted files into DIR/inference; keeps nothing
    of what is said, and sends nothing. Ctrl-C stops an answer, and once more ends.
    """
    from fedpeft_client.inference.conversation import HELP, Conversation, Terminal
    from fedpeft_client.inference.prompts import context_line

    options = _sampling(max_tokens, temperature, seed, cut_prompt)
    with _engine(directory) as (box, engine):
        if model is not None:
            _require_model(engine, model)
        program.say(context_line(engine.context, box.settings.inference.context))
        program.say(f"{model or engine.default} answers; {HELP}")
        terminal = Terminal(ask=_ask, show=_show, say=program.say)
        Conversation(engine, terminal, options, model).hold()


@app.command()
def generate(
    directory: BoxDirectory = Path(),
    prompt: _Prompt = None,
    file: _File = None,
    as_json: _AsJson = False,
    model: _Model = None,
    max_tokens: _MaxTokens = _LONGEST,
    temperature: _Temperature = 0.0,
    seed: _Seed = None,
    cut_prompt: _CutPrompt = False,
    out: Annotated[
        Path | None,
        typer.Option(help="write the answers there as JSON lines; goes on where it stopped"),
    ] = None,
) -> None:
    """Answer one question, or all of a file, with one version of the adapter.

    Reads DIR, the base model and FILE; writes converted files into DIR/inference and, if
    asked, questions and answers into OUT (mode 600); sends nothing.
    """
    from fedpeft_client.inference.answer_batch import AnswerFile, Asking, answers

    options = _sampling(max_tokens, temperature, seed, cut_prompt)
    questions = _questions(prompt, file)
    kept = out and AnswerFile(out)
    if kept:
        kept.require_writable()
    with _engine(directory) as (box, engine):
        asking = Asking(model=_require_model(engine, model or engine.default), options=options)
        left = kept.left(questions, asking) if kept else questions
        if len(left) < len(questions):
            program.say(f"{len(questions) - len(left)} answers are in {out} already; going on")
        program.say(f"{asking.model} answers {len(left)} question{'' if len(left) == 1 else 's'}")
        parallel = box.settings.inference.parallel
        for answered in answers(engine, left, asking, parallel=parallel):
            if kept:
                kept.add(answered)
            else:
                _print_answer(answered, as_json)
    if out is not None:
        program.say(f"the answers are in {out}")


@app.command()
def compare(
    directory: BoxDirectory = Path(),
    prompt: _Prompt = None,
    file: _File = None,
    model: Annotated[
        list[str] | None,
        typer.Option(help="a version, as often as needed; default: base, in use and newest"),
    ] = None,
    as_json: _AsJson = False,
    max_tokens: _MaxTokens = _LONGEST,
    cut_prompt: _CutPrompt = False,
) -> None:
    """Show the answers of the base model and of several versions side by side.

    Reads DIR, the base model and FILE; writes converted files into DIR/inference; keeps
    no question and no answer, and sends nothing. The likeliest token is always taken.
    """
    from fedpeft_client.inference.answer_batch import Asking
    from fedpeft_client.inference.catalogue import BASE

    options = _sampling(max_tokens, 0.0, None, cut_prompt)
    questions = _questions(prompt, file)
    with _engine(directory) as (box, engine):
        newest = [version.name for version in box.adapter_store.versions()[-1:]]
        names = model or [BASE, engine.default, *newest]
        asked = [_require_model(engine, name) for name in dict.fromkeys(names)]
        for question in questions:
            rows = [Asking(model=each, options=options).one(engine, question) for each in asked]
            _print_compared(question, rows, as_json)


def _sampling(
    max_tokens: int, temperature: float, seed: int | None, cut_prompt: bool
) -> "Sampling":
    from fedpeft_client.inference.engine import Sampling

    return Sampling(
        max_tokens=max_tokens, temperature=temperature, seed=seed, cut_prompt=cut_prompt
    )


@contextlib.contextmanager
def _engine(directory: Path) -> "Generator[tuple[Box, Engine]]":
    """Open a box's engine, and close it whatever happens."""
    from fedpeft_client.box import open_box
    from fedpeft_client.inference.opening import open_engine

    box = open_box(directory)
    engine = open_engine(box, box.adapter_store.catalogue, program.say)
    try:
        yield box, engine
    finally:
        engine.close()


def _require_model(engine: "Engine", name: str) -> str:
    """Return ``name`` if it can answer.

    Raises:
        UnknownAdapter: it cannot; the sentence names those that can.
    """
    from fedpeft.errors import UnknownAdapter
    from fedpeft_client.inference.prompts import unknown

    models = engine.models()
    if name not in models:
        choices = f"{'one of ' if len(models) > 1 else ''}{', '.join(models)}"
        raise UnknownAdapter(f"{unknown(name, models, {})}: choose {choices} with --model")
    return name


def _questions(prompt: str | None, file: Path | None) -> "list[Question]":
    from fedpeft_client.inference.questions import question_of, read_questions

    if (prompt is None) == (file is None):
        raise typer.BadParameter("give either --prompt or --file")
    return [question_of(prompt)] if prompt is not None else read_questions(file or Path())


def _ask() -> str:
    return input("> " if sys.stdin.isatty() else "")


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _print_answer(answered: "Answered", as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(answered, ensure_ascii=False))
    else:
        typer.echo(f"{answered['answer']}\n")


def _print_compared(question: "Question", rows: "list[Answered]", as_json: bool) -> None:
    if as_json:
        found = {row["model"]: row["answer"] for row in rows}
        line = {"schema": 1, "number": question.number, "answers": found}
        typer.echo(json.dumps(line, ensure_ascii=False))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(question.text), title_justify="left", show_lines=True)
    for row in rows:
        table.add_column(Text(row["model"]), ratio=1, overflow="fold")
    table.add_row(*(Text(row["answer"]) for row in rows))
    Console(highlight=False).print(table)
