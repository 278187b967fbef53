"""Write the manual pages of the three programs: ``make_manpages.py OUT``.

The package for Debian runs it; SOURCE_DATE_EPOCH gives the date of the pages.
"""

import os
import sys
from importlib import metadata
from pathlib import Path

import click
import typer.main

import fedpeft.cli
import fedpeft_client.cli
import fedpeft_server.cli
from fedpeft.manpages import manual_page
from fedpeft.storage import write_atomically

PROGRAMS = (fedpeft.cli.program, fedpeft_client.cli.program, fedpeft_server.cli.program)


def write_pages(out: Path) -> None:
    """Write a page for each program into ``out``."""
    for program in PROGRAMS:
        command = typer.main.get_command(program.app)
        if not isinstance(command, click.Group):
            raise TypeError(f"{program.name} has no commands")
        page = manual_page(
            program.name,
            command,
            release=metadata.version("fedpeft"),
            moment=int(os.environ.get("SOURCE_DATE_EPOCH", "0")),
        )
        write_atomically(out / f"{program.name}.1", page.encode())


if __name__ == "__main__":
    write_pages(Path(sys.argv[1]))
