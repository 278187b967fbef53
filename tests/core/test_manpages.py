"""Help, manual pages and completion: every command says what it reads, writes and sends."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import typer.main

import fedpeft.cli
import fedpeft_client.cli
import fedpeft_server.cli
from fedpeft.errors import FedpeftError
from fedpeft.manpages import leaves, manual_page

PROGRAMS = {
    program.name: program
    for program in (fedpeft.cli.program, fedpeft_client.cli.program, fedpeft_server.cli.program)
}
each_program = pytest.mark.parametrize("name", PROGRAMS)


def group(name: str) -> click.Group:
    command = typer.main.get_command(PROGRAMS[name].app)
    assert isinstance(command, click.Group)
    return command


def every_command() -> Iterator[tuple[str, click.Command]]:
    for name in PROGRAMS:
        yield from leaves(group(name), name)


COMMANDS = dict(every_command())


def page(name: str) -> str:
    return manual_page(name, group(name), release="0.1.0", moment=0)


def shown(name: str) -> str:
    """Return the page with roff's escapes undone."""
    text = page(name).replace("\\fB", "").replace("\\fR", "").replace("\\fI", "")
    return text.replace("\\-", "-").replace("\\(ga", "`").replace("\\&", "").replace("\\e", "\\")


# help


@pytest.mark.parametrize("words", COMMANDS)
@pytest.mark.parametrize("verb", ["read", "write", "send"])
def test_the_help_says_what_is_read_written_and_sent(words: str, verb: str):
    assert re.search(rf"\b{verb}s?\b", COMMANDS[words].help or "", re.IGNORECASE)


@pytest.mark.parametrize("words", COMMANDS)
def test_every_argument_and_option_is_explained(words: str):
    silent = [it.name for it in COMMANDS[words].params if not getattr(it, "help", None)]
    assert silent == []


# manual pages


@each_program
def test_the_page_names_every_command_with_all_its_options(name: str):
    text = shown(name)
    for words, command in leaves(group(name), name):
        heading = f".SS {words.removeprefix(f'{name} ')}\n"
        assert text.count(heading) == 1
        part = text.split(heading)[1].split("\n.S")[0]
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert all(option in part for option in parameter.opts)


@each_program
def test_the_page_names_every_exit_code(name: str):
    codes = {error.exit_code for error in FedpeftError.__subclasses__()} | {0, 1, 2, 130}
    section = shown(name).split(".SH EXIT STATUS")[1].split(".SH ")[0]
    assert {int(code) for code in re.findall(r"^(\d+)$", section, re.MULTILINE)} == codes


@each_program
def test_the_page_shows_no_default_that_is_none(name: str):
    assert not re.search(r"default: (None|False|True|\[|<|Sentinel)", shown(name))


def test_text_that_roff_would_take_for_a_request_is_shown_as_it_is():
    command = click.Group(
        "p", help="P.", commands={"c": click.Command("c", help=".so /etc/passwd\n\n'br \\f -x `y`")}
    )
    text = manual_page("p", command, release="1", moment=0)
    assert "\n\\&.so /etc/passwd\n" in text
    assert "\n\\&'br \\ef \\-x \\(gay\\(ga\n" in text


@each_program
@pytest.mark.parametrize(
    "command", [["man", "-l", "--warnings=all"], ["mandoc", "-T", "lint", "-W", "warning"]]
)
def test_the_page_is_read_without_a_warning(name: str, command: list[str], tmp_path: Path):
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed here")
    path = tmp_path / f"{name}.1"
    path.write_text(page(name))
    environment = {**os.environ, "MANPAGER": "cat", "MANWIDTH": "80", "LC_ALL": "C.UTF-8"}
    done = subprocess.run([*command, str(path)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""


# completion


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_shell_completes_every_command(name: str):
    program = Path(sys.executable).parent / name
    variable = f"_{name.upper().replace('-', '_')}_COMPLETE"
    environment = {
        **os.environ,
        variable: "complete_bash",
        "COMP_WORDS": f"{name} ",
        "COMP_CWORD": "1",
    }
    done = subprocess.run([program], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == list(group(name).commands)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_printed_for_the_shell(shell: str):
    program = Path(sys.executable).parent / "fedpeft-client"
    command = [program, "--show-completion", shell]
    # Else typer looks for the shell that it was started from, which a test has not.
    environment = {**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f"_FEDPEFT_CLIENT_COMPLETE=complete_{shell}" in done.stdout
