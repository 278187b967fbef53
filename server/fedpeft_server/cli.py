"""The program ``fedpeft-server``: make a site, invite clinics, run rounds."""

import logging
import re
import signal
from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from fedpeft.console import Program
from fedpeft.errors import ConfigError
from fedpeft.storage import require_folder, require_new
from fedpeft.watchdog import supervised
from fedpeft_server.commands import audit_log, backup
from fedpeft_server.commands.renewal import renewal_commands
from fedpeft_server.commands.round import admission_commands, round_commands

program = Program(
    "fedpeft-server",
    "Run the central site of a federation: invite clinics and aggregate their updates.",
)
_Directory = Annotated[Path, typer.Argument(help="the directory that `fedpeft-server init` made")]
_UNITS_S = {"m": 60, "h": 3600, "d": 86400}


@program.app.command()
def init(
    directory: Annotated[Path, typer.Argument(help="a new directory for the site")],
    address: Annotated[str, typer.Option(help="host:port as the clinics will reach it")],
    name: Annotated[str, typer.Option(help="name of the federation")] = "federation",
    base: Annotated[str, typer.Option(help="directory of the base model")] = "embedded",
    passphrase: Annotated[
        bool, typer.Option("--passphrase", help="encrypt the identity; asked for at every start")
    ] = False,
    key_file: Annotated[
        Path | None, typer.Option(help="encrypt the identity with the content of this file")
    ] = None,
) -> None:
    """Make a site: configuration to edit, a certificate authority, a certificate, an identity.

    Reads the key file if there is one; writes DIR; sends nothing.
    """
    from fedpeft.config import KeySettings, parse_settings
    from fedpeft_server.site.directory import create_site

    chosen = {"passphrase": passphrase, "key_file": key_file and key_file.absolute()}
    keys = parse_settings(KeySettings, chosen, [], where="the command line")
    site = create_site(directory, address=address, name=name, base=base, keys=keys)
    program.say(
        f"made the site of federation {site.federation.name} in {directory}, its fingerprint is "
        f"{site.sealing.public.fingerprint}; edit {directory / 'federation.toml'}, then run: "
        f"fedpeft-server invite NAME --dir {quote(str(directory))}"
    )


@program.app.command()
def invite(
    name: Annotated[str, typer.Argument(help="the clinic's name")],
    directory: Annotated[Path, typer.Option("--dir", help="the site")] = Path(),
    expires: Annotated[str, typer.Option(help="how long it is good: 30m, 48h, 7d")] = "48h",
    out: Annotated[Path | None, typer.Option(help="the file to write")] = None,
) -> None:
    """Write an invitation for one clinic; hand it over in private, it is good once.

    Reads and writes DIR/state; writes the invitation file (mode 600); sends nothing.
    """
    from fedpeft_server.site.directory import open_site

    target = out or Path(f"{name}.invitation.json")
    require_new(target)
    site, period = open_site(directory), _seconds(expires)
    invitation = site.enrolments().create_invitation(name, period, fingerprint=site.fingerprint())
    invitation.write(target)
    program.say(
        f"wrote {target}, good once until {invitation.expires:%Y-%m-%d %H:%M} UTC; on the box: "
        f"fedpeft-client join {target.name} --dir ... --model ... --train ..."
    )
    program.say(f"join shows these words, compare them by telephone: {site.words()}")


@program.app.command()
def fingerprint(
    directory: Annotated[Path, typer.Option("--dir", help="the site")] = Path(),
) -> None:
    """Print the federation's words, which a clinic compares with its own by telephone.

    Reads DIR; writes and sends nothing.
    """
    from fedpeft_server.site.directory import open_site

    typer.echo(open_site(directory).words())


@program.app.command()
def clinics(
    directory: Annotated[Path, typer.Option("--dir", help="the site")] = Path(),
) -> None:
    """List clinics and invitations: name, state, enrolled, last seen, expiry, fingerprint.

    Reads DIR/state; writes and sends nothing.
    """
    from fedpeft_server.enrolments.roster import roster
    from fedpeft_server.site.directory import open_site
    from fedpeft_server.site.expiry import expiry_warnings

    site = open_site(directory)
    enrolments = site.enrolments()
    for entry in roster(enrolments):
        typer.echo(entry.line())
    for warning in expiry_warnings(site.authority, enrolments):
        program.say(f"warning: {warning}")


@program.app.command()
def remove(
    name: Annotated[str, typer.Argument(help="the clinic's name")],
    directory: Annotated[Path, typer.Option("--dir", help="the site")] = Path(),
) -> None:
    """Take a clinic out; its box is refused from then on, and its name is free again.

    Reads and writes DIR/state; sends nothing.
    """
    from fedpeft_server.site.directory import open_site

    open_site(directory).enrolments().remove(name)
    program.say(f"removed {name}; a box that should come back needs a new invitation")


@program.app.command()
def revoke(
    name: Annotated[str, typer.Argument(help="the clinic's name")],
    directory: Annotated[Path, typer.Option("--dir", help="the site")] = Path(),
) -> None:
    """Take back an invitation, or expel a clinic: its next call is refused, its keys for ever.

    Reads and writes DIR/state; sends nothing.
    """
    from fedpeft_server.site.directory import open_site

    open_site(directory).enrolments().revoke(name)
    program.say(
        f"revoked {name}; its keys are never accepted again, and a box that should come back "
        "needs a new invitation and an empty directory"
    )


@program.app.command()
def rotate(
    directory: Annotated[Path, typer.Option("--dir", help="the site")] = Path(),
    identity: Annotated[
        bool, typer.Option("--identity", help="renew the identity too; then start the server anew")
    ] = False,
) -> None:
    """Renew the server's certificate, which a running server shows within 15 seconds.

    With --identity the old identity signs that a new one takes its place; clinics follow
    by themselves when the server is started with it. Reads and writes DIR/keys; sends
    nothing.
    """
    from fedpeft_server.site.directory import open_site
    from fedpeft_server.site.pki import renew_server_certificate

    site = open_site(directory)
    if site.authority.issued is None:
        renew_server_certificate(directory / "keys", site.listen.address)
        ends = site.authority.server_certificate_expires()
        program.say(f"the server's certificate is good until {ends:%Y-%m-%d}")
    elif not identity:
        raise ConfigError(
            "the server's certificate is of the hospital's CA: ask that for a new one and "
            "exchange the files that [tls] names, which a running server notices"
        )
    if identity:
        renewed = site.renew_identity()
        program.say(
            f"the server's identity is now {renewed.fingerprint}; start the server anew, and "
            "tell clinics that list policy.signers before that"
        )


@program.app.command()
def start(
    directory: _Directory = Path(),
    out: Annotated[Path | None, typer.Option(help="results; default DIR/run")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="table.key=value over federation.toml; may be repeated"),
    ] = None,
) -> None:
    """Serve enrolments and run the rounds; Ctrl-C stops, and the next start goes on.

    Reads DIR and the base model's configuration and fingerprint; writes DIR/state
    and the results; sends clinics the job and the adapter.
    """
    from fedpeft_server.service import serve_federation
    from fedpeft_server.site.directory import open_site, require_no_box

    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    logging.captureWarnings(capture=True)
    signal.signal(signal.SIGTERM, _interrupt)
    results = out or directory / "run"
    require_no_box(directory, f"run fedpeft-client start {quote(str(directory))}")
    site = open_site(directory, overrides)
    require_folder(results.parent)
    with supervised():
        serve_federation(site, results, program.say)
    program.say(f"finished; the adapter is in {(results / 'adapter').resolve()}")


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _seconds(text: str) -> float:
    match = re.fullmatch(r"(\d{1,4})([mhd])", text.strip())
    if match is None or not int(match[1]):
        raise ConfigError(f"--expires {text!r} is no period; write 30m, 48h or 7d")
    return int(match[1]) * _UNITS_S[match[2]]


for command in (backup.backup, backup.restore, backup.verify):
    program.app.command()(command)
program.app.add_typer(audit_log.app, name="audit-log")
program.app.add_typer(round_commands(program), name="round")
program.app.add_typer(admission_commands(program))
program.app.add_typer(renewal_commands(program))


def run() -> None:
    """Entry point of the console script."""
    program.run()
