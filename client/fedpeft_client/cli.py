"""The program ``fedpeft-client``: join a federation, check the box, take part."""

import logging
import signal
import threading
from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from fedpeft.console import Program
from fedpeft.errors import ConfigError, FedpeftError
from fedpeft.storage import write_atomically

program = Program(
    "fedpeft-client",
    "Take part in a federation: train on this clinic's records, which never leave this box.",
)
_BoxDirectory = Annotated[
    Path, typer.Argument(help="the directory that `fedpeft-client join` made")
]


@program.app.command()
def join(
    invitation: Annotated[Path, typer.Argument(help="the file from the central site")],
    directory: Annotated[Path, typer.Option("--dir", help="where this box keeps its files")],
    model: Annotated[str, typer.Option(help="directory of the base model, or 'embedded'")],
    train: Annotated[Path, typer.Option(help="records to train on (JSONL, JSON, CSV, Parquet)")],
    valid: Annotated[Path | None, typer.Option(help="records to measure with")] = None,
    layout: Annotated[
        str | None, typer.Option("--format", help="record layout, if the file leaves it open")
    ] = None,
) -> None:
    """Enrol this box with an invitation file.

    Reads the invitation, model and data paths; writes DIR (key.pem, ca.pem,
    client.toml); sends a public key and the one-time token to the server that
    the invitation names, and nothing else.
    """
    from fedpeft_client.clinic import CONFIG_FILE
    from fedpeft_client.enrolment import join as enrol
    from fedpeft_client.enrolment import read_invitation
    from fedpeft_client.settings import (
        BoxModelSettings,
        ClientSettings,
        DataSettings,
        ServerSettings,
        settings_toml,
    )

    invited = read_invitation(invitation)
    for path in (train, valid):
        if path is not None and not path.is_file():
            raise ConfigError(f"the data file {path} does not exist; name one that does")
    from fedpeft.models import fingerprint, require_fingerprint, resolve_base

    base = resolve_base(model, relative_to=Path())
    require_fingerprint(fingerprint(base), invited.fingerprint, base)
    enrolment = enrol(invitation, directory)
    settings = ClientSettings(
        clinic=enrolment.clinic,
        server=ServerSettings(address=enrolment.server, federation=enrolment.federation),
        model=BoxModelSettings(directory=base.resolve(), fingerprint=enrolment.fingerprint),
        data=DataSettings(train=train.resolve(), valid=valid and valid.resolve(), format=layout),
    )
    write_atomically(directory / CONFIG_FILE, settings_toml(settings).encode())
    program.say(
        f"joined federation {enrolment.federation} as {enrolment.clinic}; look at "
        f"{directory / CONFIG_FILE}, then run: fedpeft-client check {quote(str(directory))}"
    )


@program.app.command()
def check(directory: _BoxDirectory = Path()) -> None:
    """Say whether this box can take part: key, model, data, disk, memory and server.

    Reads everything, writes nothing, and sends the server one request without content.
    """
    from fedpeft_client.box import open_box
    from fedpeft_client.check import check as findings

    failed = False
    for finding in findings(open_box(directory)):
        failed = failed or not finding.ok
        program.say(f"{finding.subject:<7} {'ok' if finding.ok else 'PROBLEM'}: {finding.text}")
    if failed:
        raise typer.Exit(FedpeftError.exit_code)
    program.say(f"this box can take part; run: fedpeft-client start {quote(str(directory))}")


@program.app.command()
def start(directory: _BoxDirectory = Path()) -> None:
    """Take part until stopped with Ctrl-C: wait for the server's rounds and train in them.

    Reads the records and the base model; writes DIR/adapter; sends adapter
    updates, summed losses, token counts and the number of training rows.
    """
    import torch

    from fedpeft_client.app import ClinicWork, build_client_app
    from fedpeft_client.box import open_box
    from fedpeft_client.connection import ConnectionSettings, serve
    from fedpeft_client.narration import narrate_events, narrate_steps

    box = open_box(directory)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.captureWarnings(capture=True)
    if box.settings.limits.threads is not None:
        torch.set_num_threads(box.settings.limits.threads)
    stop = threading.Event()
    _stop_on_signals(stop)
    clinic = box.clinic
    work = ClinicWork(lambda _context: clinic, narrate_steps(program.say), program.say)
    settings = ConnectionSettings(
        server=box.settings.server.address,
        key=box.key,
        ca=box.ca,
        max_payload_bytes=box.settings.limits.max_message_mb << 20,
    )
    serve(build_client_app(work), settings, stop=stop, on_event=narrate_events(program.say))


def _stop_on_signals(stop: threading.Event) -> None:
    """Let the first Ctrl-C finish the answer being computed, and the second end at once."""

    def handle(*_: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        program.say("stopping when the present answer is done; Ctrl-C again stops at once")
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)


def run() -> None:
    """Entry point of the console script."""
    program.run()
