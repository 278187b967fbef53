"""How the three programs talk to people.

Everything for people goes to stderr behind the program's name, in one sentence
without a capital or full stop; stdout carries results that programs may read.
"""

import getpass
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from fedpeft.argument_help import ExplainedGroup
from fedpeft.errors import INTERRUPTED_EXIT_CODE, FedpeftError, KeyLocked

DEBUG = "FEDPEFT_DEBUG"
"""Environment variable: ``1`` prints whole tracebacks, which may hold private values."""

PASSPHRASE = "FEDPEFT_PASSPHRASE"  # noqa: S105 - the name of the variable
"""Environment variable: the passphrase of the private identity, where nobody can type it."""

people = Console(stderr=True, highlight=False)
"""Where tables, progress bars and sentences for people are printed."""


class Program:
    """One of the command-line programs, by its name."""

    def __init__(self, name: str, purpose: str) -> None:
        self.name = name
        self.app = typer.Typer(
            cls=ExplainedGroup,
            callback=self._options(),
            name=name,
            help=purpose,
            no_args_is_help=True,
            add_completion=True,
            pretty_exceptions_enable=False,
            rich_markup_mode="rich",
        )

    def _options(self) -> Callable[..., None]:
        """Return the options that stand before a command."""
        told = typer.Option(
            "--version",
            is_eager=True,
            callback=self._tell_version,
            help="print the release, and end",
        )

        def options(version: Annotated[bool, told] = False) -> None:
            """Typer reads the signature; the work is done in the option's callback."""

        return options

    def _tell_version(self, wanted: bool) -> None:
        if wanted:
            typer.echo(f"{self.name} {metadata.version('fedpeft')}")
            raise typer.Exit

    def say(self, sentence: str) -> None:
        """Print one sentence for the person at the terminal."""
        people.print(f"{self.name}: {sentence}", markup=False, soft_wrap=True)

    def run(self, arguments: Sequence[str] | None = None) -> NoReturn:
        """Run a command line (None: this process's) and exit with the documented code."""
        try:
            code = self.app(arguments, standalone_mode=False)
        except FedpeftError as error:
            self.say(f"error: {error}")
            sys.exit(error.exit_code)
        except (KeyboardInterrupt, typer.Abort):
            code = INTERRUPTED_EXIT_CODE
        except Exception as error:
            show = getattr(error, "show", None)  # click's usage errors print themselves
            if isinstance(show, Callable):
                show()
                sys.exit(getattr(error, "exit_code", 2))
            self._report_defect(error)
        # Typer turns Ctrl-C and typer.Exit inside a command into the value it returns.
        if code == INTERRUPTED_EXIT_CODE:
            self.say("stopped; what was finished is kept")
        sys.exit(code or 0)

    def _report_defect(self, error: Exception) -> NoReturn:
        """Say where a defect showed, without the values that a traceback may hold."""
        if os.environ.get(DEBUG) == "1":
            traceback.print_exception(error)
        places = traceback.extract_tb(error.__traceback__)
        where = " < ".join(f"{Path(at.filename).name}:{at.lineno}" for at in reversed(places[-3:]))
        self.say(
            f"error: a defect of fedpeft: {type(error).__name__} at {where}; please report it "
            f"({DEBUG}=1 shows more, possibly private values)"
        )
        sys.exit(FedpeftError.exit_code)


def ask_passphrase(confirm: bool) -> str:
    """Return the identity's passphrase, from the environment or typed without an echo.

    Args:
        confirm: it is new, so it has to be typed twice.

    Raises:
        KeyLocked: there is no terminal to ask at, nothing was typed, or the two differ.
    """
    if passphrase := os.environ.get(PASSPHRASE):
        return passphrase
    if not sys.stdin.isatty():
        raise KeyLocked(
            "the private identity has a passphrase and there is no terminal to ask for it: set "
            f"the environment variable {PASSPHRASE}, or use key_file in the [keys] table instead"
        )
    try:
        passphrase = getpass.getpass("passphrase of the private identity: ")
        again = getpass.getpass("the same once more: ") if confirm else passphrase
    except EOFError:
        raise KeyLocked("no passphrase was typed: start again") from None
    if passphrase != again:
        raise KeyLocked("the two passphrases differ: start again")
    return passphrase
