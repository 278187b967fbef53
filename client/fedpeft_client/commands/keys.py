"""Commands about this box's keys."""

from functools import partial
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from fedpeft.console import ask_passphrase
from fedpeft.errors import ConfigError
from fedpeft_client.commands.program import BoxDirectory, program

if TYPE_CHECKING:
    from fedpeft_client.box import Box
    from fedpeft_client.keys.renewal import Rotated

app = typer.Typer()


@app.command()
def rotate(
    directory: BoxDirectory = Path(),
    identity: Annotated[
        bool, typer.Option("--identity", help="renew the identity of this box too")
    ] = False,
    stick: Annotated[
        Path | None,
        typer.Option(help="without a network: the request to write, for the central site"),
    ] = None,
) -> None:
    """Renew the key of this box's connection; a running client goes on with the new one.

    With --identity the old identity signs that a new one takes its place, and the other
    clinics follow by themselves in the next round. Reads DIR; writes DIR/key.pem,
    DIR/membership.json, DIR/audit and, with --identity, DIR/identity.key; sends the server
    the new public keys, signed by the box's identity. With --stick it sends nothing, and writes
    these into a file; the new keys wait in DIR until fedpeft-client ticket has taken in what the
    central site answers.
    """
    from fedpeft_client.box import open_box
    from fedpeft_client.keys.renewal import follow_server, rotate_keys

    box = open_box(directory)
    if stick is not None:
        _ask_by_stick(box, stick, identity=identity)
        return
    if box.settings.server.carrier == "stick":
        option = " --identity" if identity else ""
        raise ConfigError(
            f"this box has no network (server.carrier in {box.directory / 'client.toml'}): renew "
            f"its keys by file, with fedpeft-client rotate {quote(str(directory))}{option} --stick "
            "REQUEST, and bring the request to the central site"
        )
    tell_renewed(
        rotate_keys(box, box.protection(partial(ask_passphrase, confirm=False)), identity=identity)
    )
    if (server := follow_server(box)) is not None:
        program.say(f"the server's identity was renewed too; it is now {server.fingerprint}")


def _ask_by_stick(box: "Box", request: Path, *, identity: bool) -> None:
    from fedpeft_client.sticks.renewing import ask_to_renew

    protection = box.protection(partial(ask_passphrase, confirm=False))
    ask_to_renew(box, protection, request, identity=identity)
    program.say(
        f"wrote {request}; bring the file to the central site, and with what comes back run: "
        f"fedpeft-client ticket FILE {quote(str(box.directory))}; until then this box goes on "
        "under its present keys"
    )


def tell_renewed(renewed: "Rotated") -> None:
    """Say what was renewed."""
    program.say(
        f"the key of the connection was renewed and is good until {renewed.expiry.key:%Y-%m-%d}"
    )
    if renewed.identity is not None:
        program.say(
            f"the identity was renewed too; this box's fingerprint is now "
            f"{renewed.identity.fingerprint}, tell it the central site by telephone"
        )
