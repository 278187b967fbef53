"""The manual page of a program, made from its command line, so that the two never differ.

Writes man(7) macros. Knows click's commands, and no program by name.
"""

import datetime
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import click

from fedpeft.errors import INTERRUPTED_EXIT_CODE, FedpeftError

_ENVIRONMENT: Final = {
    "FEDPEFT_PASSPHRASE": "The passphrase of the private identity, where nobody can type it.",
    "FEDPEFT_DEBUG": "1: a defect prints its whole traceback, which may hold private values.",
}


def manual_page(name: str, command: click.Group, *, release: str, moment: int) -> str:
    """Return the manual page of a program, section 1.

    Args:
        name: of the program.
        command: all of it.
        release: its version.
        moment: seconds since the epoch, of the page's date.
    """
    date = datetime.datetime.fromtimestamp(moment, datetime.UTC).date()
    purpose = _flat(command.help or "")
    lines = [
        f'.TH {_text(name).upper()} 1 "{date}" "fedpeft {_text(release)}" "User Commands"',
        ".SH NAME",
        f"{_text(name)} \\- {_text(purpose[:1].lower() + purpose[1:].rstrip('.'))}",
        ".SH SYNOPSIS",
        f".B {_text(name)}\n[\\fIoption\\fR ...] \\fIcommand\\fR [\\fIargument\\fR ...]",
        ".SH DESCRIPTION",
        _text(purpose),
        ".PP",
        "Everything for people goes to the standard error; the standard output carries results.",
        ".SH OPTIONS",
        *_parameters(command, name),
        *_tagged("--help", "Say what a program or a command does, and end."),
        ".SH COMMANDS",
        *_commands(command, name),
        ".SH EXIT STATUS",
        *_exit_codes(),
        ".SH ENVIRONMENT",
        *(line for item in _ENVIRONMENT.items() for line in _tagged(*item)),
        ".SH SEE ALSO",
        _others(name),
    ]
    return "\n".join(lines) + "\n"


def leaves(group: click.Group, path: str) -> Iterator[tuple[str, click.Command]]:
    """Yield every command below ``group`` with the words that call it."""
    for word, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from leaves(command, f"{path} {word}")
        else:
            yield f"{path} {word}", command


def _commands(group: click.Group, name: str) -> Iterator[str]:
    for words, command in leaves(group, name):
        yield f".SS {_text(words.removeprefix(f'{name} '))}"
        context = click.Context(command, info_name=words)
        usage = " ".join(command.collect_usage_pieces(context))
        yield f"\\fB{_text(words)}\\fR {_text(usage)}"
        for paragraph in textwrap.dedent(command.help or "").strip().split("\n\n"):
            yield ".PP"
            yield _text(_flat(paragraph))
        yield from _parameters(command, words)


def _parameters(command: click.Command, words: str) -> Iterator[str]:
    """Yield the arguments and options, each with what is said of it."""
    context = click.Context(command, info_name=words)
    for parameter in command.params:
        if isinstance(parameter, click.Argument):
            tag = parameter.make_metavar(context)
        else:
            takes = not getattr(parameter, "is_flag", False)
            value = f" {parameter.make_metavar(context)}" if takes else ""
            tag = ", ".join([*parameter.opts, *parameter.secondary_opts]) + value
        yield from _tagged(tag, _said(parameter))


def _said(parameter: click.Parameter) -> str:
    said = _flat(getattr(parameter, "help", None) or "")
    default = parameter.default
    if isinstance(default, bool) or not isinstance(default, str | int | float | Path):
        return said
    return said if "default" in said else f"{said} (default: {default})"


def _exit_codes() -> Iterator[str]:
    # Of each code the most general error is described: it comes before its children.
    described = {0: "Done.", 2: "The command line is wrong."}
    described[FedpeftError.exit_code] = "A defect of fedpeft, or a check that found a problem."
    for error in FedpeftError.__subclasses__():
        described.setdefault(error.exit_code, _flat((error.__doc__ or "").split("\n\n")[0]))
    described[INTERRUPTED_EXIT_CODE] = "Stopped by Ctrl-C; what was finished is kept."
    for code in sorted(described):
        yield from _tagged(str(code), described[code])


def _tagged(tag: str, said: str) -> Iterator[str]:
    yield ".TP"
    yield f"\\fB{_text(tag)}\\fR"
    yield _text(said) or "\\&"


def _others(name: str) -> str:
    programs = [each for each in ("fedpeft", "fedpeft-client", "fedpeft-server") if each != name]
    return ", ".join(f"\\fB{_text(each)}\\fR(1)" for each in programs)


def _flat(text: str) -> str:
    return " ".join(text.split())


def _text(text: str) -> str:
    """Return ``text`` so that roff shows it as it is."""
    shown = text.replace("\\", "\\e").replace("-", "\\-").replace("`", "\\(ga")
    return f"\\&{shown}" if shown[:1] in (".", "'") else shown
