"""Many questions to one version: answered a few at a time, in order, and written down.

A file of answers grows line by line, each of them durable before the next, so that a
batch that was stopped goes on where it was. Knows no terminal.
"""

import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, TypedDict, cast

from fedpeft.errors import FedpeftError, StorageError
from fedpeft.storage import explained, sync_directory
from fedpeft_client.inference.engine import Engine, Message, Sampling
from fedpeft_client.inference.questions import Question

SCHEMA: Final = 1
_PRIVATE: Final = 0o600


class Answered(TypedDict):
    """One line of a file of answers (schema 1); ``number`` is the question's place."""

    schema: int
    number: int
    model: str
    messages: list[Message]
    answer: str
    finish: str | None
    prompt_tokens: int | None
    answer_tokens: int | None
    options: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Asking:
    """How questions are asked: of which version ("base" too), and with which options."""

    model: str
    options: Sampling

    def one(self, engine: Engine, question: Question) -> Answered:
        """Wait for a whole answer.

        Raises:
            FedpeftError: it cannot be answered; the sentence names the question's place.
        """
        parts: list[str] = []
        finish = usage = None
        try:
            answer = engine.chat(question.messages, model=self.model, options=self.options)
            for piece in answer:
                parts.append(piece.text)
                finish, usage = piece.finished or finish, piece.usage or usage
        except FedpeftError as error:
            raise type(error)(f"question {question.number}: {error}") from None
        return Answered(
            schema=SCHEMA,
            number=question.number,
            model=self.model,
            messages=list(question.messages),
            answer="".join(parts),
            finish=finish,
            prompt_tokens=usage and usage.prompt,
            answer_tokens=usage and usage.answer,
            options=self.shown,
        )

    @property
    def shown(self) -> dict[str, Any]:
        """The options as JSON has them."""
        return json.loads(json.dumps(asdict(self.options)))


def answers(
    engine: Engine, questions: Sequence[Question], asking: Asking, *, parallel: int
) -> Iterator[Answered]:
    """Yield the answers in the order of the questions, computing ``parallel`` at a time.

    Raises:
        FedpeftError: a question cannot be answered; those before it were.
    """
    pool = ThreadPoolExecutor(parallel)
    try:
        waiting = [pool.submit(asking.one, engine, question) for question in questions]
        for future in waiting:
            yield future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


class AnswerFile:
    """A file of answers that can be gone on with; only its owner may read it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def require_writable(self) -> None:
        """Check before the work that answers can be written; leaves the file as it was.

        Raises:
            StorageError: they cannot.
        """
        with explained("write", self._path):
            fresh = not self._path.exists()
            os.close(self._opened())
            if fresh:
                self._path.unlink()

    def left(self, questions: Sequence[Question], asking: Asking) -> list[Question]:
        """Return the questions that the file does not answer yet, after mending its last line.

        Raises:
            StorageError: it holds something else: other questions, version or options.
        """
        lines = self._whole_lines()
        for line, question in zip(lines, questions, strict=False):
            self._require(line, question, asking)
        if len(lines) > len(questions):
            raise StorageError(
                f"{self._path} holds {len(lines)} answers where there are {len(questions)} "
                "questions: name another file with --out"
            )
        return list(questions[len(lines) :])

    def add(self, answered: Answered) -> None:
        """Append an answer, durably.

        Raises:
            StorageError: the disk is full, or the file cannot be written.
        """
        line = json.dumps(answered, ensure_ascii=False) + "\n"
        with explained("write", self._path):
            with os.fdopen(self._opened(), "ab") as file:
                file.write(line.encode())
                file.flush()
                os.fsync(file.fileno())
            sync_directory(self._path.parent)

    def _opened(self) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        return os.open(self._path, flags, _PRIVATE)

    def _whole_lines(self) -> list[bytes]:
        """Return the lines, and cut off one that a kill left without its end."""
        if not self._path.exists():
            return []
        with explained("read", self._path):
            content = self._path.read_bytes()
            end = content.rfind(b"\n") + 1
            first = content.split(b"\n", 1)[0]
            if end < len(content) and not (end or first.startswith(b'{"schema": ')):
                raise self._foreign(1)
            if end < len(content):
                os.truncate(self._path, end)
        return content[:end].splitlines()

    def _require(self, line: bytes, question: Question, asking: Asking) -> None:
        try:
            found = cast("dict[str, Any]", json.loads(line))
            number, messages = found["number"], found["messages"]
            model, options = found["model"], found["options"]
        except (ValueError, KeyError, TypeError):
            raise self._foreign(question.number) from None
        if (number, messages) != (question.number, list(question.messages)):
            raise StorageError(
                f"{self._path} answers another question {question.number} than the one that is "
                "asked: name another file with --out, or the questions that it was begun with"
            )
        if (model, options) != (asking.model, asking.shown):
            raise StorageError(
                f"{self._path} was begun with {model} and other options, and {asking.model} would "
                "go on: ask as before (--model, --max-tokens, --temperature, --seed, "
                "--cut-prompt), or name another file with --out"
            )

    def _foreign(self, number: int) -> StorageError:
        return StorageError(
            f"{self._path} holds something else than answers (line {number}): name another file "
            "with --out"
        )
