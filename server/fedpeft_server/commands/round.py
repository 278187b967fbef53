"""``fedpeft-server round``: rounds with clinics that have no network, by files on a stick."""

from pathlib import Path
from typing import Annotated

import typer

from fedpeft.console import Program
from fedpeft.errors import StickRefused

_Site = Annotated[Path, typer.Option("--dir", help="the site")]


def round_commands(program: Program) -> typer.Typer:
    """Return the commands, which speak as ``program``."""
    app = typer.Typer(help="Carry rounds to clinics without a network, by files on a stick.")

    @app.command("export")
    def export(
        directory: _Site = Path(),
        clinic: Annotated[
            list[str] | None, typer.Option(help="only this clinic; may be repeated")
        ] = None,
        out: Annotated[Path, typer.Option(help="the folder to write into")] = Path(),
    ) -> None:
        """Write a file for each clinic on the stick that is asked something now.

        Reads DIR/state; writes the files (mode 600) into OUT, each with what the clinic would
        get over the network, sealed for it; sends nothing. Run it beside the running server.
        A question that was exported before is the same file again.
        """
        from fedpeft_server.site.directory import open_site
        from fedpeft_server.sticks.carrying import Carrying

        site = open_site(directory)
        carrying = Carrying(site.state, site.enrolments())
        written = carrying.export(clinic or [], out)
        for question, path in written:
            program.say(
                f"{question.clinic}: round {question.context.round}, {question.context.purpose}; "
                f"on the box, run: fedpeft-client round run {path.name}"
            )
            typer.echo(path)
        if not written:
            program.say(carrying.why_nothing(clinic or []))

    @app.command("import")
    def take_in(
        files: Annotated[list[Path], typer.Argument(help="files of `fedpeft-client round run`")],
        directory: _Site = Path(),
    ) -> None:
        """Take in the answers that came on sticks; exit with 19 if one of them was refused.

        Reads the files and DIR/state; writes DIR/state; sends nothing. The good ones of several
        are taken all the same, and none is ever counted twice.
        """
        from fedpeft_server.site.directory import open_site
        from fedpeft_server.sticks.carrying import Carrying

        site = open_site(directory)
        carrying, limit = Carrying(site.state, site.enrolments()), site.listen.max_message_mb << 20
        refused = 0
        for path in files:
            imported = carrying.take(path, limit)
            if imported.answer is None:
                refused += 1
                program.say(imported.refused)
                continue
            answer, said = imported.answer, ""
            if answer.reason:
                said = f"; it says no: {answer.reason}"
            program.say(
                f"took {path}: {answer.clinic}, round {answer.context.round}, "
                f"{answer.context.purpose}{said}"
            )
        if refused:
            raise StickRefused(_summary(refused, len(files)))

    return app


def _summary(refused: int, files: int) -> str:
    """Say of ``files`` how many were refused, and what became of the others."""
    if refused == files:
        return "nothing was taken, for the reason above" + ("s" if files > 1 else "")
    were, others = "was" if refused == 1 else "were", files - refused
    rest = "the other one was" if others == 1 else f"the other {others} were"
    return f"{refused} of {files} files {were} refused, as said above; {rest} taken"


def admission_commands(program: Program) -> typer.Typer:
    """Return the commands about clinics that join by stick."""
    app = typer.Typer()

    @app.command()
    def admit(
        request: Annotated[Path, typer.Argument(help="the file of `fedpeft-client join --stick`")],
        directory: _Site = Path(),
        out: Annotated[Path | None, typer.Option(help="the ticket to write")] = None,
    ) -> None:
        """Enrol a clinic that has no network by its request, and write its ticket.

        Reads the request and the site's identity; writes DIR/state and the ticket, which is
        good for that box alone and holds no secret; sends nothing.
        """
        from fedpeft_server.site.directory import open_site
        from fedpeft_server.sticks.admission import admit_by_stick

        target = out or request.with_name(f"{request.name.removesuffix('.json')}.ticket.json")
        name = admit_by_stick(open_site(directory), request, target)
        program.say(
            f"admitted {name}, which is reached by stick; wrote {target}, on the box: "
            f"fedpeft-client ticket {target.name}"
        )

    @app.command()
    def carrier(
        name: Annotated[str, typer.Argument(help="the clinic's name")],
        way: Annotated[str, typer.Argument(help="network or stick")],
        directory: _Site = Path(),
    ) -> None:
        """Reach a clinic by another way from the next question on: network or stick.

        Reads and writes DIR/state; sends nothing. What was asked before is still awaited on the
        way that it went.
        """
        from fedpeft_server.site.directory import open_site
        from fedpeft_server.sticks.admission import carrier_of

        open_site(directory).enrolments().carry(name, carrier_of(way))
        program.say(f"{name} is reached by {way} from the next question on")

    return app
