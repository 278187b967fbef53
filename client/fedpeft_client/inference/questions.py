"""Questions to an adapter, from the command line or a file. Knows no engine.

Nothing of a question is ever part of an error or a log: they are as private as records.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from fedpeft.errors import DataError
from fedpeft_client.inference.engine import Message

_JSON_LINES = (".jsonl", ".ndjson")
_JSON = ".json"


@dataclass(frozen=True, slots=True, repr=False)
class Question:
    """A conversation that waits for its next answer, and its place (from 1) in the file."""

    number: int
    messages: tuple[Message, ...]

    def __repr__(self) -> str:
        return f"Question(number={self.number}, messages={len(self.messages)})"

    @property
    def text(self) -> str:
        """The last turn, which is to be answered."""
        return self.messages[-1]["content"]


def question_of(text: str, number: int = 1) -> Question:
    """Return a question of one turn.

    Raises:
        DataError: it is empty.
    """
    if not text.strip():
        raise DataError(f"question {number} is empty: write what the model should answer")
    return Question(number, ({"role": "user", "content": text},))


def read_questions(path: Path) -> list[Question]:
    """Read a file: JSON lines (``.jsonl``), one JSON array (``.json``), else a question a line.

    A JSON line is an object with ``prompt`` or ``question`` (a text), or with ``messages``
    (turns with ``role`` and ``content``, the last by the user). Empty lines are left out.
    An array holds such objects, or texts.

    Raises:
        DataError: the file cannot be read, holds no question, or something that is none.
    """
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = (getattr(error, "strerror", None) or "").lower() or "it is not UTF-8 text"
        raise DataError(f"cannot read questions from {path}: {why}") from None
    if path.suffix.lower() == _JSON:
        return _array(path, text)
    as_json = path.suffix.lower() in _JSON_LINES
    found: list[Question] = []
    # Not splitlines: it also cuts where Unicode has marks of its own, which JSON may hold.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        question = _of_row(_parsed(line), number) if as_json else question_of(line, number)
        if question is None:
            raise DataError(
                f"line {number} of {path} is no question: write an object with prompt, question "
                "or messages, the last of them by the user"
            )
        found.append(question)
    if not found:
        raise DataError(f"{path} holds no question: write one a line")
    return found


def _array(path: Path, text: str) -> list[Question]:
    rows = _parsed(text)
    if not isinstance(rows, list) or not rows:
        raise DataError(
            f"{path} is no JSON array of questions: write one, or an object a line in a file "
            "whose name ends with .jsonl"
        )
    found: list[Question] = []
    for number, row in enumerate(cast("list[Any]", rows), 1):
        question = _of_row({"question": row} if isinstance(row, str) else row, number)
        if question is None:
            raise DataError(
                f"entry {number} of {path} is no question: write a text, or an object with "
                "prompt, question or messages, the last of them by the user"
            )
        found.append(question)
    return found


def _parsed(text: str) -> Any:
    """Return what JSON says; None, which is no question either, if it is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _of_row(row: Any, number: int) -> Question | None:
    if not isinstance(row, Mapping):
        return None
    fields = cast("Mapping[str, Any]", row)
    given = [fields[key] for key in ("prompt", "question", "messages") if key in fields]
    if len(given) != 1:
        return None
    if isinstance(given[0], str):
        return question_of(given[0], number) if given[0].strip() else None
    return _conversation(given[0], number)


def _conversation(turns: Any, number: int) -> Question | None:
    if not isinstance(turns, list) or not turns:
        return None
    messages: list[Message] = []
    for turn in cast("list[Any]", turns):
        if not isinstance(turn, Mapping):
            return None
        fields = cast("Mapping[str, Any]", turn)
        role, content = fields.get("role"), fields.get("content")
        if not isinstance(role, str) or not isinstance(content, str):
            return None
        messages.append({"role": role, "content": content})
    return Question(number, tuple(messages)) if messages[-1]["role"] == "user" else None
