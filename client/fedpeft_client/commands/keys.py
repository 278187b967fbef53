"""Commands about this box's keys."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from fedpeft.console import ask_passphrase
from fedpeft_client.commands.program import BoxDirectory, program

app = typer.Typer()


@app.command()
def rotate(
    directory: BoxDirectory = Path(),
    identity: Annotated[
        bool, typer.Option("--identity", help="renew the identity of this box too")
    ] = False,
) -> None:
    """Renew the key of this box's connection; a running client goes on with the new one.

    With --identity the old identity signs that a new one takes its place, and the other
    clinics follow by themselves in the next round. Reads DIR; writes DIR/key.pem,
    DIR/membership.json, DIR/audit and, with --identity, DIR/identity.key; sends the server
    the new public keys, signed by the box's identity.
    """
    from fedpeft_client.box import open_box
    from fedpeft_client.keys.renewal import follow_server, rotate_keys

    box = open_box(directory)
    protection = box.protection(partial(ask_passphrase, confirm=False))
    renewed = rotate_keys(box, protection, identity=identity)
    program.say(
        f"the key of the connection was renewed and is good until {renewed.expiry.key:%Y-%m-%d}"
    )
    if renewed.identity is not None:
        program.say(
            f"the identity was renewed too; this box's fingerprint is now "
            f"{renewed.identity.fingerprint}, tell it the central site by telephone"
        )
    if (server := follow_server(box)) is not None:
        program.say(f"the server's identity was renewed too; it is now {server.fingerprint}")
