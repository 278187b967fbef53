"""``python -m fedpeft_server``: the program ``fedpeft-server``."""

from fedpeft_server.cli import run

run()
