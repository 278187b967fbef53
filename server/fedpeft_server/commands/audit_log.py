"""``fedpeft-server audit-log``: what the central site did, for who checks it."""

from pathlib import Path
from typing import Annotated

import typer

from fedpeft.counts import counted
from fedpeft.errors import AuditLogDamaged
from fedpeft.storage import require_new

app = typer.Typer(help="What this site did, in a log that shows when it was changed.")
_Directory = Annotated[Path, typer.Argument(help="the directory that `fedpeft-server init` made")]


@app.command()
def show(
    directory: _Directory = Path(),
    since: Annotated[str | None, typer.Option(help="from this day on (UTC), as 2026-01-31")] = None,
    until: Annotated[str | None, typer.Option(help="up to and with this day")] = None,
    run: Annotated[str | None, typer.Option(help="only this run, by its number")] = None,
    kind: Annotated[
        str | None, typer.Option(help="only this kind, such as message-in, adapter or key")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object a line")] = False,
) -> None:
    """List what the log holds, a line each: number, time (UTC), kind, what it says.

    Reads DIR/audit; writes and sends nothing. It does not check the log: see verify.
    """
    from fedpeft.audit_log import Choice, all_lines, day_of, entries_in, entry_json, entry_text
    from fedpeft_server.site.directory import open_site

    choice = Choice(
        since=day_of(since, "--since"), until=day_of(until, "--until"), run=run, kind=kind
    )
    for entry in entries_in(all_lines(open_site(directory).audit), choice):
        typer.echo(entry_json(entry) if as_json else entry_text(entry))


@app.command()
def verify(
    directory: Annotated[
        Path, typer.Argument(help="the site, or a file that audit-log export wrote")
    ] = Path(),
    kept: Annotated[
        str | None, typer.Option(help="an end that was kept elsewhere, as verify prints it")
    ] = None,
) -> None:
    """Look for changed, missing, reordered or cut-off entries; exit with 18 if there are any.

    Reads DIR/audit and DIR/keys/identity.pub, or an exported file; writes and sends nothing.
    """
    from fedpeft.audit_log import end_of, read_export, verdict_lines
    from fedpeft.audit_log import verify as check
    from fedpeft.sealing.succession import Succession
    from fedpeft_server.site.directory import open_site

    end = end_of(kept, "--kept")
    if directory.is_file():
        exported = read_export(directory)
        typer.echo(f"keeper\t{exported.name}, fingerprint {exported.identity.fingerprint}")
        verdict = exported.verify(end)
    else:
        site = open_site(directory)
        earlier = [Succession.from_json(line).old for line in site.sealing.succession]
        verdict = check(site.audit, identity=site.sealing.public, earlier=earlier, kept=end)
    for line in verdict_lines(verdict):
        typer.echo(line)
    if verdict.problems:
        raise AuditLogDamaged(
            f"the audit log of {directory} has {counted(len(verdict.problems), 'problem')}, listed "
            "above: "
            "keep a copy to look into it, and tell those who answer for this machine"
        )


@app.command()
def export(
    out: Annotated[Path, typer.Option(help="the file to write")],
    directory: _Directory = Path(),
) -> None:
    """Write the whole log into one file for an auditor, who checks it with verify.

    Reads DIR/audit and DIR/keys/identity.pub; writes the file OUT (mode 600); sends nothing.
    """
    from fedpeft.audit_log import export as write
    from fedpeft_server.site.directory import open_site

    require_new(out)
    site = open_site(directory)
    verdict = write(site.audit, out, name="server", identity=site.sealing.public)
    typer.echo(f"entries\t{verdict.entries}")
    if verdict.problems:
        raise AuditLogDamaged(
            f"{out} was written, and the audit log has "
            f"{counted(len(verdict.problems), 'problem')}: run "
            "fedpeft-server audit-log verify to see them"
        )
