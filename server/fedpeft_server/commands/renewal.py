"""``fedpeft-server renew``: the keys of a clinic that has no network are renewed by files."""

from pathlib import Path
from typing import Annotated

import typer

from fedpeft.console import Program


def renewal_commands(program: Program) -> typer.Typer:
    """Return the command, which speaks as ``program``."""
    app = typer.Typer()

    @app.command()
    def renew(
        request: Annotated[
            Path, typer.Argument(help="the file of `fedpeft-client rotate --stick`")
        ],
        directory: Annotated[Path, typer.Option("--dir", help="the site")] = Path(),
        out: Annotated[Path | None, typer.Option(help="the confirmation to write")] = None,
    ) -> None:
        """Renew the keys of a clinic that has no network, and write what confirms that.

        Reads the request and the site's identity; writes DIR/state, DIR/audit and the
        confirmation, which is good for that request alone and holds no secret; sends nothing.
        """
        from fedpeft_server.site.directory import open_site
        from fedpeft_server.sticks.renewal import renew_by_stick

        name = f"{request.name.removesuffix('.json')}.confirmed.json"
        target = out or request.with_name(name)
        clinic = renew_by_stick(open_site(directory), request, target)
        program.say(
            f"renewed the keys of {clinic}; wrote {target}, on the box: fedpeft-client ticket "
            f"{target.name}"
        )

    return app
