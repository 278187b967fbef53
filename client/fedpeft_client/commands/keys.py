"""Commands about this box's keys."""

from functools import partial
from pathlib import Path

import typer

from fedpeft.console import ask_passphrase
from fedpeft_client.commands.program import BoxDirectory, program

app = typer.Typer()


@app.command()
def rotate(directory: BoxDirectory = Path()) -> None:
    """Renew the key of this box's connection; a running client goes on with the new one.

    Reads DIR; writes DIR/key.pem and DIR/membership.json; sends the server a new public
    key, signed by the box's identity, which stays.
    """
    from fedpeft_client.box import open_box
    from fedpeft_client.renewal import follow_server, renew_key

    box = open_box(directory)
    identity = box.load_identity(partial(ask_passphrase, confirm=False))
    expires = renew_key(box, identity)
    program.say(f"the key of the connection was renewed and is good until {expires:%Y-%m-%d}")
    if (server := follow_server(box)) is not None:
        program.say(f"the server's identity was renewed too; it is now {server.fingerprint}")
