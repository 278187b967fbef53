"""Layouts: which one is recognised, what each row becomes, and what is refused."""

from pathlib import Path

import pytest

from fedpeft.data import FORMAT_NAMES, Record, RecordSet, Turn
from fedpeft.data.formats import BadRow, Row, choose_format, detect_format, to_record
from fedpeft.errors import DataError

QUESTION = "Is it <b>benign</b>?\n"
ANSWER = " Yes. "
PAIR = (Turn("user", QUESTION), Turn("assistant", ANSWER))

ROWS: dict[str, Row] = {
    "messages": {
        "messages": [
            {"role": "user", "content": QUESTION},
            {"role": "assistant", "content": ANSWER},
        ]
    },
    "sharegpt": {
        "conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]
    },
    "alpaca": {"instruction": QUESTION, "input": "", "output": ANSWER},
    "prompt-completion": {"prompt": QUESTION, "completion": ANSWER},
    "question-answer": {"question": QUESTION, "answer": ANSWER},
    "text": {"text": QUESTION},
}


def record_of(row: Row, place: int = 1) -> Record:
    return to_record(row, detect_format(row.keys()), place)


def reason_of(row: Row) -> str:
    with pytest.raises(BadRow) as caught:
        record_of(row)
    assert caught.value.__context__ is None
    return caught.value.reason


def chat(*turns: object) -> Row:
    return {"messages": list(turns)}


USER = {"role": "user", "content": "q"}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": "q", "answer": None}, "no answer ('answer')"),
        ({"question": "q", "answer": " \n"}, "an empty answer ('answer')"),
        ({"question": "q", "answer": 5}, "an answer ('answer') that is not text"),
        ({"question": "", "answer": "a"}, "an empty question ('question')"),
        ({"question": "q", "answer": "\ud800"}, "an answer ('answer') with an invalid Unicode"),
        ({"instruction": "i", "input": ["x"], "output": "o"}, "an input ('input') that is not"),
        ({"instruction": None, "output": "o"}, "no instruction ('instruction')"),
        ({"text": ""}, "an empty text ('text')"),
        ({"messages": None}, "no 'messages'"),
        ({"messages": "hello"}, "a 'messages' that is not a list of turns"),
        (chat("hello"), "a 'messages' that is not a list of turns"),
        (chat(), "no answer (the last turn is not by the assistant)"),
        (chat(USER), "no answer (the last turn is not by the assistant)"),
        (chat({"role": "assistant", "content": "a"}), "no question (no turn is by the user)"),
        (chat({"content": "q"}), "a turn without a role ('role')"),
        (
            chat({"role": "doctor", "content": "q"}),
            "an unknown role ('role' must be one of system, user, assistant)",
        ),
        (chat({"role": ["user"], "content": "q"}), "an unknown role"),
        (chat({"role": "user", "content": None}), "no user turn ('content')"),
        (chat(USER, {"role": "assistant", "content": ""}), "an empty answer ('content')"),
        ({"conversations": [{"from": "tool", "value": "q"}]}, "an unknown role ('from'"),
        ({"text": "t", "label": ["x"]}, "a 'label' that is neither text nor a whole number"),
        ({"text": "t", "patient_id": 1.5}, "a 'patient_id' that is neither text nor a whole"),
        ({"text": "t", "patient_id": "\udfff"}, "a 'patient_id' with an invalid Unicode"),
    ],
)
def test_bad_row_is_refused_with_its_reason(row: Row, reason: str) -> None:
    assert reason_of(row).startswith(reason)


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_each_format_is_recognised_and_keeps_its_text(name: str) -> None:
    row = ROWS[name]
    assert detect_format(row.keys()).name == name
    record = record_of(row, place=7)
    assert record.row == 7
    assert (record.turns, record.text) == (((), QUESTION) if name == "text" else (PAIR, None))


def test_alpaca_input_follows_the_instruction() -> None:
    record = record_of({"instruction": "Sum up.", "input": "A note.", "output": "x"})
    assert record.turns[0] == Turn("user", "Sum up.\n\nA note.")


def test_system_and_later_turns_are_kept() -> None:
    record = record_of(
        {
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": "q1"},
                {"from": "gpt", "value": "a1"},
                {"from": "user", "value": "q2"},
                {"from": "assistant", "value": "a2"},
            ]
        }
    )
    assert [turn.role for turn in record.turns] == [
        "system",
        "user",
        "assistant",
        "user",
        "assistant",
    ]
    assert record.turns[-1].text == "a2"


@pytest.mark.parametrize(
    ("value", "name"),
    [("p7", "p7"), (7, "7"), (7.0, "7"), (None, None), (float("nan"), None), (" ", None)],
)
def test_patient_id_and_label_become_text(value: object, name: str | None) -> None:
    record = record_of({"text": "t", "patient_id": value, "label": value})
    assert (record.patient_id, record.label) == (name, name)


def test_the_more_structured_format_wins() -> None:
    assert detect_format({"text", "question", "answer"}).name == "question-answer"
    assert detect_format({"text", "messages"}).name == "messages"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"instruction"}, "the nearest is 'alpaca', which lacks 'output'"),
        ({"question", "reply"}, "the nearest is 'question-answer', which lacks 'answer'"),
        ({"Mr Smith has a cough"}, "no column has a name that fedpeft knows"),
    ],
)
def test_unknown_columns_are_refused_with_the_nearest_format(
    columns: set[str], message: str
) -> None:
    with pytest.raises(DataError) as caught:
        detect_format(columns)
    assert message in str(caught.value)
    assert "Smith" not in str(caught.value), "a header may be record text"


@pytest.mark.parametrize(
    ("name", "columns", "message"),
    [
        (
            "alpaca",
            {"question", "answer"},
            "format 'alpaca' was asked for, but the columns 'instruction' and 'output' are "
            "missing: the nearest format is 'question-answer'",
        ),
        (
            "alpaca",
            {"instruction", "text"},
            "format 'alpaca' was asked for, but the column 'output' is missing: the nearest "
            "format is 'text'",
        ),
        ("text", {"x"}, "but the column 'text' is missing: no format fits"),
        ("alpacca", {"text"}, "there is no format 'alpacca': did you mean 'alpaca'?"),
        ("xyz", {"text"}, "there is no format 'xyz': use one of messages, sharegpt, alpaca"),
    ],
)
def test_wrong_override_names_what_is_missing(name: str, columns: set[str], message: str) -> None:
    with pytest.raises(DataError) as caught:
        choose_format(name, columns)
    assert message in str(caught.value)


def test_override_beats_precedence() -> None:
    assert choose_format("text", {"text", "question", "answer"}).name == "text"


def test_nothing_printed_shows_text_or_patient() -> None:
    record = Record((Turn("user", "SECRET"), Turn("assistant", "SECRET")), 3, "SECRET", "SECRET")
    plain = Record((), 4, "SECRET", None, text="SECRET")
    whole = RecordSet((record, plain), "text", Path("a/b.csv"), {}, 1, "line", "plain text")
    shown = f"{record!r} {record.turns!r} {plain!r} {whole!r} {whole} {whole.describe()}"
    assert "SECRET" not in shown
    assert "Record(row=3, turns=2)" in shown
    assert whole.describe() == "a/b.csv: 2 rows, plain text, 1 patient"
