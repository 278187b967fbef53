"""The program ``fedpeft-client``: join a federation, check the box, take part."""

import json
import logging
import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import click
import typer
from typer.core import TyperGroup

from fedpeft.console import ask_passphrase
from fedpeft.errors import ConfigError, EnrolmentError, FedpeftError, LedgerDamaged
from fedpeft.storage import require_folder, write_atomically
from fedpeft.watchdog import supervised
from fedpeft_client.commands import adapters, audit_log, chat, export, keys, serve
from fedpeft_client.commands import round as rounds
from fedpeft_client.commands.program import BoxDirectory, program

if TYPE_CHECKING:
    from fedpeft.privacy.ledger import Ledger


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
    passphrase: Annotated[
        bool, typer.Option("--passphrase", help="encrypt the identity; asked for at every start")
    ] = False,
    key_file: Annotated[
        Path | None, typer.Option(help="encrypt the identity with the content of this file")
    ] = None,
    words: Annotated[
        str | None, typer.Option(help="the federation's words, as the central site read them out")
    ] = None,
    stick: Annotated[
        Path | None,
        typer.Option(help="without a network: the request to write, for the central site"),
    ] = None,
) -> None:
    """Enrol this box with an invitation file.

    Reads the invitation, model and data paths, and the key file if there is one; shows
    the federation's words, and with --words stops before anything is sent if they are
    others; writes DIR (key.pem, identity.key, server.identity, ca.pem, client.toml); sends
    a public key, a public identity, a signature and the one-time token to the server that
    the invitation names, and nothing else. With --stick it sends nothing, and writes these into
    a file, with a proof in the token's place; the box has joined when fedpeft-client ticket
    has taken in what the central site answers.
    """
    from fedpeft.config import KeySettings, parse_settings
    from fedpeft.sealing.keyfile import protection_from
    from fedpeft.sealing.words import same_words
    from fedpeft_client.keys.enrolment import IDENTITY_FILE, read_invitation
    from fedpeft_client.keys.enrolment import join as enrol
    from fedpeft_client.settings import (
        CONFIG_FILE,
        BoxModelSettings,
        ClientSettings,
        DataSettings,
        ServerSettings,
        settings_toml,
    )
    from fedpeft_client.sticks.joining import ask_to_join
    from fedpeft_client.trail import joining

    invited = read_invitation(invitation)
    program.say(f"the federation's words are: {invited.words()}")
    if words is not None and not same_words(words, invited.words()):
        raise EnrolmentError(
            f"the words of the invitation {invitation} are not those of --words, so it may have "
            "been exchanged on its way: nothing was sent; call the central site"
        )
    for path in (train, valid):
        if path is not None and not path.is_file():
            raise ConfigError(f"the data file {path} does not exist; name one that does")
    from fedpeft.models import fingerprint, require_fingerprint, resolve_base

    base = resolve_base(model, relative_to=Path())
    require_fingerprint(fingerprint(base), invited.fingerprint, base)
    chosen = {"passphrase": passphrase, "key_file": key_file and key_file.absolute()}
    keys = parse_settings(KeySettings, chosen, [], where="the command line")
    # After an interrupted attempt the identity is there, and its passphrase is not new.
    ask = partial(ask_passphrase, confirm=not (directory / IDENTITY_FILE).exists())
    protection = protection_from(keys, Path(), ask)
    settings = ClientSettings(
        clinic=invited.clinic,
        server=ServerSettings(
            address=invited.server,
            federation=invited.federation,
            carrier="network" if stick is None else "stick",
        ),
        model=BoxModelSettings(directory=base.resolve(), fingerprint=invited.fingerprint),
        data=DataSettings(train=train.resolve(), valid=valid and valid.resolve(), format=layout),
        keys=keys,
    )
    if stick is not None:
        require_folder(stick.parent)
        with joining(directory, invited.clinic, by_stick=True):
            own = ask_to_join(invited, directory, protection, settings_toml(settings), stick)
        program.say(
            f"wrote {stick}, this box's fingerprint is {own.fingerprint}; bring the file to the "
            "central site, and with what comes back run: fedpeft-client ticket TICKET "
            f"{quote(str(directory))}"
        )
        return
    with joining(directory, invited.clinic):
        enrolment = enrol(invitation, directory, protection)
    write_atomically(directory / CONFIG_FILE, settings_toml(settings).encode())
    program.say(
        f"joined federation {enrolment.federation} as {enrolment.clinic}, this box's fingerprint "
        f"is {enrolment.identity.fingerprint}; look at "
        f"{directory / CONFIG_FILE}, then run: fedpeft-client check {quote(str(directory))}"
    )


@program.app.command()
def check(directory: BoxDirectory = Path()) -> None:
    """Say whether this box can take part: keys, model, data, disk, memory and server.

    Reads everything, writes nothing, and sends the server one request without content; a box
    without a network looks at what it keeps from stick to stick instead, and sends nothing.
    """
    from fedpeft_client.box import open_box
    from fedpeft_client.reports.check import check as findings

    failed = False
    box = open_box(directory)
    for finding in findings(box, partial(ask_passphrase, confirm=False)):
        failed = failed or not finding.ok
        program.say(f"{finding.subject:<8} {'ok' if finding.ok else 'PROBLEM'}: {finding.text}")
    if failed:
        raise typer.Exit(FedpeftError.exit_code)
    place = quote(str(directory))
    if box.settings.server.carrier == "stick":
        program.say(
            "this box can take part; when a file of the central site comes, run: fedpeft-client "
            f"round run FILE --dir {place}"
        )
    else:
        program.say(f"this box can take part; run: fedpeft-client start {place}")


@program.app.command()
def peers(
    directory: BoxDirectory = Path(),
    forget: Annotated[
        str | None, typer.Option(help="a clinic whose new key was compared by telephone")
    ] = None,
) -> None:
    """List the other clinics that this box has seen, a line each: name and key fingerprint.

    Reads DIR; writes nothing, but with --forget takes that clinic out of DIR/peers.json;
    sends nothing.
    """
    from fedpeft_client.box import open_box

    book = open_box(directory).peers
    if forget is not None:
        book.forget(forget)
        program.say(f"forgot {forget}; it counts as never seen from the next round on")
    for name, fingerprint in book.known().items():
        typer.echo(f"{name}\t{fingerprint}")


@program.app.command()
def status(directory: BoxDirectory = Path()) -> None:
    """Say which federation this box is in, what it demands, and what it last took part in.

    Reads DIR; writes and sends nothing.
    """
    from fedpeft_client.box import open_box
    from fedpeft_client.reports.status import status_lines

    for line in status_lines(open_box(directory)):
        typer.echo(line)


# A whole round of training may take an hour, and a service manager does not wait for it.
_GRACE_S = 10


class _ShownByDefault(TyperGroup):
    """``ledger DIR`` means ``ledger show DIR``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put ``show`` in front of what is not the name of a command."""
        if "--help" not in args and (not args or args[0] not in self.commands):
            args = ["show", *args]
        return super().parse_args(ctx, args)


_ledger = typer.Typer(
    cls=_ShownByDefault, help="What was spent of this clinic's privacy budget, and what is left."
)
program.app.add_typer(_ledger, name="ledger")


@_ledger.command()
def show(
    directory: BoxDirectory = Path(),
    as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
) -> None:
    """Say what was spent, what is left, per job, and what one more round would cost.

    Reads DIR and the ledger; writes and sends nothing.
    """
    from fedpeft.privacy.ledger import ledger_exists
    from fedpeft_client.box import open_box
    from fedpeft_client.reports.ledger_view import (
        DatasetReport,
        ledger_reports,
        report_json,
        report_lines,
    )

    box = open_box(directory)
    reports: list[DatasetReport] = []
    program.say(f"the privacy ledger of this box is {box.ledger_path}")
    if ledger_exists(box.ledger_path):
        with _intact_ledger(box.ledger_path) as ledger:
            reports = ledger_reports(ledger, box.law)
    if as_json:
        typer.echo(json.dumps(report_json(reports), indent=2, allow_nan=False))
        return
    for line in report_lines(reports):
        typer.echo(line)


@_ledger.command()
def verify(directory: BoxDirectory = Path()) -> None:
    """Look for edited, missing or reordered rows in the ledger; exit with 16 if there are any.

    Reads DIR and the ledger; writes and sends nothing.
    """
    from fedpeft.privacy.ledger import ledger_exists
    from fedpeft_client.box import open_box

    path = open_box(directory).ledger_path
    if not ledger_exists(path):
        program.say(f"nothing was charged yet, so there is no ledger {path}")
        return
    with _intact_ledger(path) as ledger:
        end = ledger.end()
    program.say(f"the ledger is intact: {end.seq} rows, the last one with hash {end.hash}")


@contextmanager
def _intact_ledger(path: Path) -> "Generator[Ledger]":
    """Open a ledger, after printing what is wrong with it, if anything is."""
    from fedpeft.privacy.ledger import Ledger

    with Ledger(path) as ledger:
        if problems := ledger.verify():
            for problem in problems:
                typer.echo(problem)
            raise LedgerDamaged(
                f"the privacy ledger {path} has {len(problems)} problems, listed above: no job "
                "runs until it and the .head file beside it are restored from one backup"
            )
        yield ledger


@program.app.command()
def start(directory: BoxDirectory = Path()) -> None:
    """Take part until stopped with Ctrl-C: wait for the server's rounds and train in them.

    Reads the records and the base model; writes DIR/adapters, DIR/status.json,
    DIR/standing.json, DIR/refusal.json, DIR/traffic.json, DIR/peers.json, DIR/checkpoints,
    the privacy ledger and, before anything leaves, DIR/audit; sends the adapter's change,
    summed losses, token counts and the number of training rows: masked, so that the server
    learns only sums over clinics, unless DIR/client.toml allows that it opens them
    (require_secagg = false). Of a job with noise no loss is sent, but what it cost. What the
    rules of DIR/client.toml forbid is refused by the rule's name.
    """
    stop = threading.Event()
    _stop_on_signals(stop)
    from fedpeft_client.box import open_box
    from fedpeft_client.box_lock import only_program
    from fedpeft_client.keys.key_life import expiry_warnings
    from fedpeft_client.limits.processors import bound_processors
    from fedpeft_client.link.connection import ConnectionSettings, Event, serve
    from fedpeft_client.link.standing import KeptStanding
    from fedpeft_client.rounds.app import ClinicDesk, build_client_app
    from fedpeft_client.rounds.live_clinic import LiveClinic
    from fedpeft_client.rounds.narration import narrate_events, narrate_steps
    from fedpeft_client.rounds.work import ClinicWork
    from fedpeft_client.trail import BoxTrail, unlocking

    box = open_box(directory)
    if box.settings.server.carrier == "stick":
        raise ConfigError(
            "there is nothing to start on a box without a network (server.carrier in "
            f"{box.directory / 'client.toml'}): run fedpeft-client round run FILE --dir "
            f"{quote(str(directory))} with each file of the central site; where there is a network "
            'now, write carrier = "network"'
        )
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.captureWarnings(capture=True)
    if box.settings.limits.threads is not None:
        bound_processors(box.settings.limits.threads)
    with unlocking(box.audit):
        clinic = LiveClinic(box, box.protection(partial(ask_passphrase, confirm=False)))
    for warning in expiry_warnings(box.directory, box.ca):
        program.say(f"warning: {warning}")
    trail = BoxTrail.open(box.audit, clinic.present, program.say)
    clinic.when_renewed(trail.kept_by)
    desk = ClinicDesk(
        lambda _context: clinic.present,
        ClinicWork(narrate_steps(program.say), program.say),
        seen=box.status.saw,
        refused=lambda error: box.refusals.note(error.reason, str(error)),
        tell=program.say,
        trail=trail,
    )
    settings = ConnectionSettings(
        server=box.settings.server.address,
        key=box.key,
        ca=box.ca,
        max_payload_bytes=box.settings.limits.max_message_mb << 20,
        traffic=box.traffic(),
    )
    narrate = narrate_events(program.say)

    def listen(event: Event) -> None:
        narrate(event)
        if event.rule:
            box.refusals.note(event.rule, event.detail)
        clinic.heard(event)
        if event.kind in ("connected", "disconnected"):
            trail.connection(event.kind)

    app = build_client_app(desk)
    with supervised(), only_program(directory), trail.session():
        standing = KeptStanding(directory)
        serve(app, settings, stop=stop, on_event=listen, trail=trail, standing=standing)


def _stop_on_signals(stop: threading.Event) -> None:
    """Let the first Ctrl-C finish the answer being computed if that is soon done.

    The second one, or the end of that time, ends at once: the box goes on from its checkpoint.
    """

    def handle(*_: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        program.say(
            f"stopping when the present answer is done, in {_GRACE_S} seconds at the latest; "
            "Ctrl-C again stops at once"
        )
        stop.set()
        # To the main thread, so that a call that it waits in ends too.
        end = threading.Timer(_GRACE_S, signal.pthread_kill, (main, signal.SIGINT))
        end.daemon = True
        end.start()

    main = threading.main_thread().ident or 0
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)


for topic in (adapters, chat, serve, export, audit_log, keys, rounds):
    program.app.add_typer(topic.app)


def run() -> None:
    """Entry point of the console script."""
    program.run()
