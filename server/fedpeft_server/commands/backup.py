"""``fedpeft-server backup``, ``restore`` and ``verify``: the site's state, kept and checked."""

import getpass
import sys
import tempfile
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from fedpeft.console import people
from fedpeft.counts import counted
from fedpeft.errors import ConfigError, EvidenceError, KeyLocked
from fedpeft.storage import require_new

if TYPE_CHECKING:
    from fedpeft.sealing.keyfile import Protection
    from fedpeft_server.backup.restoring import Restored

_KeyFile = Annotated[
    Path | None, typer.Option(help="encrypt with the content of this file; keep it elsewhere")
]
_Passphrase = Annotated[
    bool, typer.Option("--passphrase", help="encrypt with a passphrase, asked for at the terminal")
]
_OpensWith = Annotated[Path | None, typer.Option(help="the key file that encrypted the backup")]
_Asks = Annotated[
    bool, typer.Option("--passphrase", help="ask for the passphrase that encrypted the backup")
]


def backup(
    directory: Annotated[
        Path, typer.Argument(help="the directory that `fedpeft-server init` made")
    ],
    out: Annotated[Path, typer.Option(help="the file to write")],
    key_file: _KeyFile = None,
    passphrase: _Passphrase = False,
    plain: Annotated[
        bool, typer.Option("--plain", help="do not encrypt: whoever has the file has the keys")
    ] = False,
    results: Annotated[
        Path | None, typer.Option(help="where `start --out` put the run; default DIR/run")
    ] = None,
) -> None:
    """Write the whole site into one file (mode 600), also while the server runs.

    Reads DIR, the run, and the key file; writes OUT, which holds every key of the site;
    sends nothing.
    """
    from fedpeft_server.backup.archive import write_backup
    from fedpeft_server.backup.snapshot import files_of
    from fedpeft_server.site.directory import open_site, require_no_box

    if [key_file is not None, passphrase, plain].count(True) != 1:
        raise ConfigError(
            "a backup holds the keys of the site, so say how it is protected: --key-file FILE, "
            "--passphrase, or --plain if the place that it goes to is as safe as the site"
        )
    require_no_box(
        directory,
        'stop its client and copy the folder, as docs/operations.md says under "The box"',
    )
    site = open_site(directory)
    if out.resolve().is_relative_to(directory.resolve()):
        raise ConfigError(
            f"{out} lies in the site itself, whose loss it is for: name a file elsewhere with --out"
        )
    require_new(out)
    run = results or directory / "run"
    if tls := site.listen.tls:
        for path in (tls.certificate, tls.key, tls.ca):
            if not (directory / path).resolve().is_relative_to(directory.resolve()):
                _say(
                    f"warning: {directory / path} lies outside of the site and is not in the "
                    "backup; restoring needs it in the same place"
                )
    protection = _protection(key_file, passphrase, confirm=True)
    manifest = write_backup(
        out,
        files_of(directory, run, _say),
        protection,
        (site.federation.name, site.sealing.public.fingerprint),
    )
    size = out.stat().st_size / 1e6
    how = "not encrypted" if plain else f"encrypted with {protection.source}"
    _say(
        f"wrote {out}: {counted(len(manifest.files), 'file')}, "
        f"{counted(manifest.rounds, 'round')}, {size:.1f} MB, {how}, read again and whole; try "
        f"it: fedpeft-server verify {quote(str(out))}{_secret_options(key_file, passphrase)}"
    )


def restore(
    file: Annotated[Path, typer.Argument(help="what `fedpeft-server backup` wrote")],
    directory: Annotated[Path, typer.Argument(help="a new or empty folder for the site")],
    key_file: _OpensWith = None,
    passphrase: _Asks = False,
) -> None:
    """Make a site from a backup, after checking all of it; says what to do next.

    Reads FILE and the key file; writes DIR; sends nothing. Invitations that were open are
    taken back. The server of the old site must not run any more.
    """
    from fedpeft_server.backup.restoring import restore as make

    made = make(file, directory, _protection(key_file, passphrase, confirm=False), _say)
    for sentence in _what_to_know(made, directory):
        _say(sentence)


def verify(
    file: Annotated[
        Path | None, typer.Argument(help="what `fedpeft-server backup` wrote; default: the site")
    ] = None,
    directory: Annotated[Path, typer.Option("--dir", help="the site")] = Path(),
    results: Annotated[
        Path | None, typer.Option(help="where `start --out` put the run; default DIR/run")
    ] = None,
    key_file: _OpensWith = None,
    passphrase: _Asks = False,
) -> None:
    """Check a site or a backup, a line for each finding; exit with 18 if something is damaged.

    Checks permissions, keys, certificate, every round against its signed lineage, the audit
    log and the databases; a server may run. Reads DIR, or FILE and the key file; writes
    nothing but a temporary folder of mode 700 into which FILE is unpacked; sends nothing.
    """
    from fedpeft_server.backup.archive import read_backup

    if file is None:
        _report(directory, results or directory / "run", str(directory))
        return
    protection = _protection(key_file, passphrase, confirm=False)
    with tempfile.TemporaryDirectory(prefix="fedpeft-verify-") as folder:
        site = Path(folder)
        manifest = read_backup(file, protection, site)
        typer.echo(
            f"backup\tok\tof federation {manifest.federation}, {manifest.created}, by fedpeft "
            f"{manifest.release}, {counted(len(manifest.files), 'file')}"
        )
        _report(site, site / "run", str(file))


def _report(site: Path, results: Path, name: str) -> None:
    from fedpeft_server.site.check import check_site

    damaged = 0
    for finding in check_site(site, results):
        damaged += finding.is_damage
        typer.echo(finding.line())
    if damaged:
        raise EvidenceError(
            f"{name} is damaged, findings of damage: {damaged}, listed: each says what to do; "
            "keep a copy before you change anything"
        )


def _protection(key_file: Path | None, passphrase: bool, *, confirm: bool) -> "Protection":
    from fedpeft.sealing.keyfile import Protection

    if key_file is not None and passphrase:
        raise ConfigError("name either --key-file or --passphrase: there is one secret")
    if key_file is not None:
        return Protection.key_file(key_file)
    if not passphrase:
        return Protection.none()
    if not sys.stdin.isatty():
        raise KeyLocked(
            "there is no terminal to ask for the backup's passphrase: use --key-file instead"
        )
    text = getpass.getpass("passphrase of the backup: ")
    if confirm and getpass.getpass("the same once more: ") != text:
        raise KeyLocked("the two passphrases differ: start again")
    return Protection.passphrase(text)


def _secret_options(key_file: Path | None, passphrase: bool) -> str:
    """Return what a command needs to open what these options have encrypted."""
    if key_file is not None:
        return f" --key-file {quote(str(key_file))}"
    return " --passphrase" if passphrase else ""


def _what_to_know(made: "Restored", directory: Path) -> list[str]:
    about, place = made.manifest, quote(str(directory))
    run = "no run" if made.last_round is None else f"a run up to round {made.last_round}"
    told = [
        f"restored federation {about.federation} with {run} into {directory}, as it was at "
        f"{about.created}; make sure that the old server is off for good, then run: "
        f"fedpeft-server start {place}",
        f"enrolled again are: {', '.join(made.clinics) or 'nobody'}; whom you have revoked or "
        f"removed since then, revoke again before you start: fedpeft-server revoke NAME --dir "
        f"{place}; whoever joined, or renewed its keys, since then must be invited anew",
    ]
    if made.taken_back:
        told.append(
            f"open invitations were taken back, as they may have been used since: "
            f"{', '.join(made.taken_back)}"
        )
    if made.last_round is not None:
        told.append(
            "rounds that were finished since then are made again from what was restored: nothing "
            "is counted twice in the adapter, and each clinic's ledger counts what it spends for "
            "both"
        )
    if made.forgets_noise:
        told.append(
            "the server adds the noise of this federation, and what it has let out since then is "
            "not in its totals: the epsilon of the summary and the lineages is too small by those "
            "rounds, and the clinics' ledgers are right; begin a new run with --out if the totals "
            "must hold"
        )
    return told


def _say(sentence: str) -> None:
    people.print(f"fedpeft-server: {sentence}", markup=False, soft_wrap=True)
