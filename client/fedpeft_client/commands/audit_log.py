"""``fedpeft-client audit-log``, ``disclosures`` and ``verify``: what happened, to check it."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedpeft.console import ask_passphrase
from fedpeft.counts import counted
from fedpeft.errors import AuditLogDamaged, KeyLocked, LedgerDamaged
from fedpeft_client.commands.program import BoxDirectory, program

if TYPE_CHECKING:
    from fedpeft.audit_log import Verdict
    from fedpeft.sealing import PublicIdentity
    from fedpeft_client.box import Box
    from fedpeft_client.reports.disclosures import Charged

app = typer.Typer()
_log = typer.Typer(help="What this box did, in a log that shows when it was changed.")
app.add_typer(_log, name="audit-log")

_Since = Annotated[str | None, typer.Option(help="from this day on (UTC), as 2026-01-31")]
_Until = Annotated[str | None, typer.Option(help="up to and with this day")]
_Kept = Annotated[
    str | None, typer.Option(help="an end that was kept elsewhere, as verify prints it")
]


@_log.command()
def show(
    directory: BoxDirectory = Path(),
    since: _Since = None,
    until: _Until = None,
    run: Annotated[str | None, typer.Option(help="only this run, by its number")] = None,
    kind: Annotated[
        str | None, typer.Option(help="only this kind, such as message-out, decision or key")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object a line")] = False,
) -> None:
    """List what the log holds, a line each: number, time (UTC), kind, what it says.

    Reads DIR/audit; writes and sends nothing. It does not check the log: see verify.
    """
    from fedpeft.audit_log import Choice, all_lines, day_of, entries_in, entry_json, entry_text
    from fedpeft_client.box import open_box

    choice = Choice(
        since=day_of(since, "--since"), until=day_of(until, "--until"), run=run, kind=kind
    )
    for entry in entries_in(all_lines(open_box(directory).audit), choice):
        typer.echo(entry_json(entry) if as_json else entry_text(entry))


@_log.command()
def verify(
    directory: Annotated[
        Path, typer.Argument(help="the box, or a file that audit-log export wrote")
    ] = Path(),
    kept: _Kept = None,
) -> None:
    """Look for changed, missing, reordered or cut-off entries; exit with 18 if there are any.

    Reads DIR/audit and the box's identity, or an exported file; writes and sends nothing.
    """
    from fedpeft.audit_log import end_of, read_export, verdict_lines
    from fedpeft.audit_log import verify as check
    from fedpeft_client.box import open_box

    end = end_of(kept, "--kept")
    if directory.is_file():
        exported = read_export(directory)
        program.say(
            f"the file says that it is the log of {exported.name}, whose identity has fingerprint "
            f"{exported.identity.fingerprint}: compare it by telephone"
        )
        verdict = exported.verify(end)
    else:
        box = open_box(directory)
        identity = box.load_identity(lambda: ask_passphrase(confirm=False)).public
        verdict = check(box.audit, identity=identity, kept=end)
    for line in verdict_lines(verdict):
        typer.echo(line)
    _require_whole(verdict, directory)
    program.say("the audit log is whole; keep its end in another place, to find an older copy")


@_log.command()
def export(
    out: Annotated[Path, typer.Option(help="the file to write")],
    directory: BoxDirectory = Path(),
) -> None:
    """Write the whole log into one file for an auditor, who checks it with verify.

    Reads DIR/audit and the box's identity; writes the file OUT (mode 600); sends nothing.
    """
    from fedpeft.audit_log import export as write
    from fedpeft.storage import require_new
    from fedpeft_client.box import open_box

    require_new(out)
    box = open_box(directory)
    identity = box.load_identity(lambda: ask_passphrase(confirm=False)).public
    verdict = write(box.audit, out, name=box.settings.clinic, identity=identity)
    program.say(
        f"wrote {counted(verdict.entries, 'entry', 'entries')} to {out}; the fingerprint to "
        f"compare by telephone is {identity.fingerprint}"
    )
    _require_whole(verdict, directory)


@app.command()
def disclosures(
    directory: BoxDirectory = Path(),
    since: _Since = None,
    until: _Until = None,
    page: Annotated[
        Path | None, typer.Option("--html", help="also write a page to print and file")
    ] = None,
) -> None:
    """Say what left this box, per day and run, how much, and under which protection.

    Reads DIR/audit and the privacy ledger; writes the HTML file if one is named; sends
    nothing. It exits with 18 if the log is damaged, and says so if it may be incomplete.
    """
    from datetime import UTC, datetime

    from fedpeft.audit_log import Choice, all_lines, day_of, entries_in
    from fedpeft.audit_log import verify as check
    from fedpeft.storage import require_folder, write_atomically
    from fedpeft_client.box import open_box
    from fedpeft_client.reports.disclosures import report_lines, report_of
    from fedpeft_client.reports.disclosures_page import Heading
    from fedpeft_client.reports.disclosures_page import page as html_of

    choice = Choice(since=day_of(since, "--since"), until=day_of(until, "--until"))
    if page is not None:
        require_folder(page.parent)
    box = open_box(directory)
    identity = _identity(box)
    verdict = check(box.audit, identity=identity)
    report = report_of(
        entries_in(all_lines(box.audit), Choice()),
        entries_in(all_lines(box.audit), choice),
        verdict,
        _charged(box),
        locked=identity is None,
    )
    for line in report_lines(report):
        typer.echo(line)
    if page is not None:
        heading = Heading(
            clinic=box.settings.clinic,
            federation=box.settings.server.federation,
            server=box.server_identity.fingerprint,
            period=f"{since or 'the beginning'} to {until or 'now'}",
            made=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        )
        write_atomically(page, html_of(report, heading).encode(), mode=0o600)
        program.say(f"wrote {page}")
    _require_whole(verdict, directory)


@app.command(name="verify")
def verify_adapter(
    adapter: Annotated[Path, typer.Argument(help="the directory of an adapter")],
    directory: Annotated[
        Path, typer.Option("--dir", help="the box whose server must have signed it")
    ] = Path(),
    server_identity: Annotated[
        Path | None,
        typer.Option(help="a file with the server's public identity, in place of the box"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
) -> None:
    """Check that an adapter is what the server signed, and say what made it.

    Reads ADAPTER, the adapters beside it, and the server's identity in DIR or the file;
    writes and sends nothing. It exits with 18 if anything was changed.
    """
    from fedpeft.protocol.lineage_check import check_directory, report, sentences
    from fedpeft.sealing.public_file import load_public_identity
    from fedpeft_client.box import open_box

    if server_identity is not None:
        server = load_public_identity(server_identity)
    else:
        server = open_box(directory).server_identity
    found = check_directory(adapter, server)
    if as_json:
        typer.echo(json.dumps(report(found), indent=2))
        return
    for line in sentences(found):
        typer.echo(line)
    program.say("the adapter is the one that the server signed")


def _require_whole(verdict: "Verdict", place: Path) -> None:
    if verdict.problems:
        raise AuditLogDamaged(
            f"the audit log of {place} has {counted(len(verdict.problems), 'problem')}, listed "
            "above: keep a copy to look into it, and tell those who answer for this machine"
        )


def _identity(box: "Box") -> "PublicIdentity | None":
    """Return the box's identity, or None where somebody would have to unlock it."""

    def locked() -> str:
        raise KeyLocked("the identity is locked")

    try:
        return box.load_identity(locked).public
    except KeyLocked:
        return None


def _charged(box: "Box") -> "Charged | None":
    """Return what the ledger says; None if it is damaged."""
    from fedpeft.privacy.ledger import Ledger, ledger_exists
    from fedpeft_client.reports.disclosures import Charged
    from fedpeft_client.reports.ledger_view import ledger_reports, report_lines

    if not ledger_exists(box.ledger_path):
        return Charged(rounds=frozenset(), steps=0, lines=())
    try:
        with Ledger(box.ledger_path) as ledger:
            if ledger.verify():
                return None
            reports, rounds = ledger_reports(ledger, box.law), ledger.rounds()
    except LedgerDamaged:
        return None
    own = box.settings.server.federation
    steps = (job.steps for each in reports for job, _ in each.jobs if job.federation == own)
    lines = (line.partition("\t") for line in report_lines(reports))
    return Charged(
        rounds=frozenset((run, number) for name, run, number in rounds if name == own),
        steps=sum(steps),
        lines=tuple((subject, text) for subject, _, text in lines),
    )
