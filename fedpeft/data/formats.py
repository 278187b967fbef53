"""The layouts in which clinics write records, and how a row of each is understood.

Must not know files or file types: a row arrives as a mapping of column names to
values, whatever it was read from. Must not put any value of a row into a message:
only the names in this file are safe to show, because the first line of a CSV
without a header, or a JSON key, can itself be record text.
"""

import difflib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, cast

from fedpeft.data.records import Record, Role, Turn
from fedpeft.errors import DataError

Row: TypeAlias = Mapping[str, object]


class BadRow(Exception):
    """A row that cannot be used; ``reason`` is a phrase without any of its text."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Format:
    """A layout: ``required`` columns tell it apart, ``read`` takes a row's content."""

    name: str
    title: str
    required: tuple[str, ...]
    read: Callable[[Row], tuple[Turn, ...] | str]

    def missing(self, columns: Collection[str]) -> tuple[str, ...]:
        """Return the required columns that are not among ``columns``."""
        return tuple(name for name in self.required if name not in columns)


def _is_unicode(value: str) -> bool:
    # JSON can spell half of a surrogate pair, which no tokenizer accepts. This is
    # a function of its own because UnicodeEncodeError carries the whole text, and
    # must not become the context of the error that is raised.
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _text(row: Row, column: str, meaning: str, *, may_be_empty: bool = False) -> str:
    article = "an" if meaning[0] in "aei" else "a"
    value = row.get(column)
    if value is None:
        if may_be_empty:
            return ""
        raise BadRow(f"no {meaning} ('{column}')")
    if not isinstance(value, str):
        raise BadRow(f"{article} {meaning} ('{column}') that is not text")
    if not may_be_empty and not value.strip():
        raise BadRow(f"an empty {meaning} ('{column}')")
    if not _is_unicode(value):
        raise BadRow(f"{article} {meaning} ('{column}') with an invalid Unicode character")
    return value


def _pair(question: str, answer: str) -> Callable[[Row], tuple[Turn, ...]]:
    def read(row: Row) -> tuple[Turn, ...]:
        return (
            Turn("user", _text(row, question, "question")),
            Turn("assistant", _text(row, answer, "answer")),
        )

    return read


def _alpaca(row: Row) -> tuple[Turn, ...]:
    instruction = _text(row, "instruction", "instruction")
    context = _text(row, "input", "input", may_be_empty=True)
    question = f"{instruction}\n\n{context}" if context else instruction
    return (Turn("user", question), Turn("assistant", _text(row, "output", "answer")))


_CHAT_ROLES: dict[str, Role] = {"system": "system", "user": "user", "assistant": "assistant"}
_SHAREGPT_ROLES: dict[str, Role] = {**_CHAT_ROLES, "human": "user", "gpt": "assistant"}


def _chat(
    column: str, role_key: str, text_key: str, roles: Mapping[str, Role]
) -> Callable[[Row], tuple[Turn, ...]]:
    def read_turn(turn: object) -> Turn:
        if not isinstance(turn, Mapping):
            raise BadRow(f"a '{column}' that is not a list of turns")
        fields = cast("Row", turn)
        spelling = fields.get(role_key)
        if spelling is None:
            raise BadRow(f"a turn without a role ('{role_key}')")
        role = roles.get(spelling) if isinstance(spelling, str) else None
        if role is None:
            raise BadRow(f"an unknown role ('{role_key}' must be one of {', '.join(roles)})")
        meaning = "answer" if role == "assistant" else f"{role} turn"
        return Turn(role, _text(fields, text_key, meaning))

    def read(row: Row) -> tuple[Turn, ...]:
        turns = row.get(column)
        if turns is None:
            raise BadRow(f"no '{column}'")
        if not isinstance(turns, Sequence) or isinstance(turns, str | bytes):
            raise BadRow(f"a '{column}' that is not a list of turns")
        found = tuple(read_turn(turn) for turn in cast("Sequence[object]", turns))
        if not found or found[-1].role != "assistant":
            raise BadRow("no answer (the last turn is not by the assistant)")
        if all(turn.role != "user" for turn in found):
            raise BadRow("no question (no turn is by the user)")
        return found

    return read


def _plain(row: Row) -> str:
    return _text(row, "text", "text")


FORMATS: tuple[Format, ...] = (
    Format(
        "messages",
        "chat messages",
        ("messages",),
        _chat("messages", "role", "content", _CHAT_ROLES),
    ),
    Format(
        "sharegpt",
        "ShareGPT conversations",
        ("conversations",),
        _chat("conversations", "from", "value", _SHAREGPT_ROLES),
    ),
    Format("alpaca", "Alpaca instructions", ("instruction", "output"), _alpaca),
    Format(
        "prompt-completion",
        "prompts and completions",
        ("prompt", "completion"),
        _pair("prompt", "completion"),
    ),
    Format(
        "question-answer",
        "questions and answers",
        ("question", "answer"),
        _pair("question", "answer"),
    ),
    Format("text", "plain text", ("text",), _plain),
)
"""In order of precedence, for a file that has the columns of more than one."""

FORMAT_NAMES: tuple[str, ...] = tuple(layout.name for layout in FORMATS)


def _quoted(names: Collection[str]) -> str:
    return " and ".join(f"'{name}'" for name in names)


def _nearest(columns: Collection[str]) -> Format | None:
    """Return the format with the largest share of its columns there, if any is."""

    def share(layout: Format) -> float:
        return 1 - len(layout.missing(columns)) / len(layout.required)

    best = max(FORMATS, key=share)
    return best if share(best) > 0 else None


def detect_format(columns: Collection[str]) -> Format:
    """Return the format that the column names fit.

    Raises:
        DataError: no format fits; the message names the nearest one and what it
            lacks. It does not name the file: the caller puts that in front.
    """
    for layout in FORMATS:
        if not layout.missing(columns):
            return layout
    nearest = _nearest(columns)
    if nearest is None:
        known = "; ".join(_quoted(layout.required) for layout in FORMATS)
        raise DataError(
            f"no column has a name that fedpeft knows: name the columns as in one of {known}"
        )
    raise DataError(
        f"the columns fit no format: the nearest is '{nearest.name}', which lacks "
        f"{_quoted(nearest.missing(columns))}: add or rename it"
    )


def choose_format(name: str, columns: Collection[str]) -> Format:
    """Return the format called ``name`` if the column names fit it.

    Raises:
        DataError: there is no such format, or it does not fit; the message names
            what is missing and the format that does fit. It does not name the
            file: the caller puts that in front.
    """
    chosen = next((layout for layout in FORMATS if layout.name == name), None)
    if chosen is None:
        near = difflib.get_close_matches(name, FORMAT_NAMES, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"use one of {', '.join(FORMAT_NAMES)}"
        raise DataError(f"there is no format '{name}': {hint}")
    missing = chosen.missing(columns)
    if missing:
        nearest = _nearest(columns)
        hint = "no format fits" if nearest is None else f"the nearest format is '{nearest.name}'"
        noun = "column" if len(missing) == 1 else "columns"
        raise DataError(
            f"format '{name}' was asked for, but the {noun} {_quoted(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing: {hint}"
        )
    return chosen


def _name(row: Row, column: str) -> str | None:
    """Return an id or a class label as text; a whole number is one too."""
    value = row.get(column)
    # pandas writes a column of whole numbers with gaps as floats, and the gaps as NaN.
    if value is None or (isinstance(value, float) and value != value):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str | int):
        raise BadRow(f"a '{column}' that is neither text nor a whole number")
    name = str(value)
    if not _is_unicode(name):
        raise BadRow(f"a '{column}' with an invalid Unicode character")
    return name if name.strip() else None


def to_record(row: Row, layout: Format, place: int) -> Record:
    """Return the record that ``row`` holds; ``place`` is its line or row number.

    Text is taken as it stands, spaces included.

    Raises:
        BadRow: the row cannot be used; the reason holds none of its text.
    """
    content = layout.read(row)
    turns, text = ((), content) if isinstance(content, str) else (content, None)
    return Record(turns, place, _name(row, "patient_id"), _name(row, "label"), text)
