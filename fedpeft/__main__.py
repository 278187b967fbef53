"""``python -m fedpeft``: the program ``fedpeft``."""

from fedpeft.cli import run

run()
