"""The command ``serve``: answers for programs on this machine, in the protocol of OpenAI."""

from pathlib import Path
from typing import Annotated

import typer

from fedpeft_client.commands.program import BoxDirectory, program

app = typer.Typer()


@app.command()
def serve(
    directory: BoxDirectory = Path(),
    listen: Annotated[
        str | None, typer.Option(help="HOST:PORT instead of inference.listen")
    ] = None,
    certificate: Annotated[
        Path | None, typer.Option(help="certificate chain (PEM), to serve over TLS")
    ] = None,
    private_key: Annotated[
        Path | None, typer.Option(help="private key (PEM) of the certificate")
    ] = None,
) -> None:
    """Answer questions of programs with this box's adapters, over OpenAI's protocol.

    Reads DIR and the base model; writes DIR/inference (converted files) and, when it
    listens beyond this machine, DIR/api.key once; sends answers to whoever asked, and
    nothing else to anybody. Stops on Ctrl-C when the running answers are finished.
    """
    from fedpeft_client.inference.serving import Listening, serve_box

    if (certificate is None) != (private_key is None):
        raise typer.BadParameter("--certificate and --private-key belong together: give both")
    tls = None if certificate is None or private_key is None else (certificate, private_key)
    serve_box(directory, Listening(address=listen, tls=tls), tell=program.say)
