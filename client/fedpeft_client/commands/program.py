"""The program that all commands of a clinic box belong to, and the argument that they share."""

from pathlib import Path
from typing import Annotated

import typer

from fedpeft.console import Program

program = Program(
    "fedpeft-client",
    "Take part in a federation: train on this clinic's records, which never leave this box.",
)
BoxDirectory = Annotated[Path, typer.Argument(help="the directory that `fedpeft-client join` made")]
