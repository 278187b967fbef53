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

_JSON = (".jsonl", ".ndjson", ".json")


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
    """Read a file: JSON lines if its name ends with ``.jsonl``, else a question a line.

    A JSON line is an object with ``prompt`` or ``question`` (a text), or with ``messages``
    (turns with ``role`` and ``content``, the last by the user). Empty lines are left out.

    Raises:
        DataError: the file cannot be read, holds no question, or a line that is none.
    """
    try:
        # Not splitlines: it also cuts where Unicode has marks of its own, which JSON may hold.
        lines = path.read_text("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        why = (getattr(error, "strerror", None) or "").lower() or "it is not UTF-8 text"
        raise DataError(f"cannot read questions from {path}: {why}") from None
    as_json = path.suffix.lower() in _JSON
    found: list[Question] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        question = _from_json(line, number) if as_json else question_of(line, number)
        if question is None:
            raise DataError(
                f"line {number} of {path} is no question: write an object with prompt, question "
                "or messages, the last of them by the user"
            )
        found.append(question)
    if not found:
        raise DataError(f"{path} holds no question: write one a line")
    return found


def _from_json(line: str, number: int) -> Question | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
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
