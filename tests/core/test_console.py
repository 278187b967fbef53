"""The command lines' manners: exit codes, one sentence, and no private value."""

import sys
from collections.abc import Callable

import pytest
import typer

from fedpeft import console, errors
from fedpeft.console import Program
from fedpeft.errors import DataError, FedpeftError

CANARY = "Mrs Canary, born 1951-02-03"


def outcome(work: Callable[[], object], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Return the exit code of a program whose one command does ``work``."""
    program = Program("fedpeft-test", "Does one thing.")

    @program.app.command()
    def go(number: int = 0) -> None:  # pyright: ignore[reportUnusedFunction]
        work()

    @program.app.command()
    def rest() -> None:  # pyright: ignore[reportUnusedFunction]
        """Make ``go`` one of two commands, as in the real programs."""

    monkeypatch.setattr(sys, "argv", ["fedpeft-test", *arguments])
    with pytest.raises(SystemExit) as caught:
        program.run()
    assert isinstance(caught.value.code, int)
    return caught.value.code


def raising(error: BaseException) -> Callable[[], object]:
    def work() -> object:
        raise error

    return work


def children(root: type[FedpeftError]) -> list[type[FedpeftError]]:
    return [root] + [one for child in root.__subclasses__() for one in children(child)]


@pytest.mark.parametrize(
    "kind", [one for one in children(FedpeftError) if one.__module__ == errors.__name__]
)
def test_each_error_exits_with_its_code_and_its_sentence(
    kind: type[FedpeftError],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    assert outcome(raising(kind("this is why")), monkeypatch, "go") == kind.exit_code
    shown = capsys.readouterr()
    assert shown.err == "fedpeft-test: error: this is why\n"
    assert shown.out == ""


@pytest.mark.parametrize("error", [ValueError(CANARY), KeyError(CANARY), MemoryError(CANARY)])
def test_a_defect_shows_no_value_and_exits_1(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.delenv(console.DEBUG, raising=False)
    assert outcome(raising(error), monkeypatch, "go") == 1
    shown = capsys.readouterr()
    assert "Canary" not in shown.out + shown.err
    assert f"{type(error).__name__} at test_console.py:" in shown.err
    assert "Traceback" not in shown.err


def test_a_defect_shows_everything_where_a_person_asked_for_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv(console.DEBUG, "1")
    assert outcome(raising(ValueError(CANARY)), monkeypatch, "go") == 1
    assert CANARY in capsys.readouterr().err


def test_ctrl_c_exits_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    assert outcome(raising(KeyboardInterrupt()), monkeypatch, "go") == 130
    assert capsys.readouterr().err.endswith("fedpeft-test: stopped; what was finished is kept\n")


def test_a_refused_question_exits_130(monkeypatch: pytest.MonkeyPatch):
    assert outcome(raising(typer.Abort()), monkeypatch, "go") == 130


@pytest.mark.parametrize(
    "arguments",
    [["go", "--numbr", "1"], ["go", "--number", "x"], ["went"], [], ["go", "surplus"]],
)
def test_a_wrong_command_line_exits_2(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert outcome(lambda: None, monkeypatch, *arguments) == 2
    assert "defect" not in capsys.readouterr().err


@pytest.mark.parametrize("code", [0, 4])
def test_a_command_may_name_its_exit_code(code: int, monkeypatch: pytest.MonkeyPatch):
    assert outcome(raising(typer.Exit(code)), monkeypatch, "go") == code


def test_success_exits_0(monkeypatch: pytest.MonkeyPatch):
    assert outcome(lambda: None, monkeypatch, "go") == 0


def test_help_exits_0(monkeypatch: pytest.MonkeyPatch):
    assert outcome(lambda: None, monkeypatch, "--help") == 0


def test_brackets_in_a_sentence_are_shown_as_they_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    outcome(raising(DataError("the table [[clinic]] [red]x[/red]")), monkeypatch, "go")
    assert "the table [[clinic]] [red]x[/red]" in capsys.readouterr().err
