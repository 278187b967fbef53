"""``python -m fedpeft_client``: the program ``fedpeft-client``."""

from fedpeft_client.cli import run

run()
