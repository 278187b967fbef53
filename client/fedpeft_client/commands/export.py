"""``fedpeft-client export``: the adapted model in the file formats of other tools."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast, get_args

import typer

from fedpeft_client.commands.program import BoxDirectory, program
from fedpeft_client.export.formats import Format

if TYPE_CHECKING:
    from fedpeft.gguf_format import Quantisation

app = typer.Typer()


@app.command()
def export(
    form: Annotated[
        Format,
        typer.Option(
            "--format",
            help="peft, gguf-lora: the adapter alone; merged, gguf, onnx: the whole model",
        ),
    ],
    out: Annotated[Path, typer.Option(help="a new folder for the result")],
    directory: BoxDirectory = Path(),
    adapter: Annotated[
        str | None,
        typer.Option(help="a name from `fedpeft-client adapters list`; default: the one in use"),
    ] = None,
    quantisation: Annotated[
        str | None,
        typer.Option(help="of --format gguf: f32, f16 (the default), q8_0, q4_0 or q4_k_m"),
    ] = None,
) -> None:
    """Write the adapter, or the base model with the adapter in it, for other tools to use.

    Reads the adapter in DIR/adapters and the base model; writes the folder OUT, which only
    its owner can read; sends nothing. What was written is read again and compared with the
    adapted model. An adapter can give away text of the records that it was trained on.
    """
    if quantisation is not None and form is not Format.gguf:
        raise typer.BadParameter(f"--quantisation belongs to --format gguf, not to {form.value}")
    from fedpeft import gguf_format
    from fedpeft.errors import UnknownAdapter
    from fedpeft_client.box import open_box
    from fedpeft_client.export.exporting import export as write
    from fedpeft_client.export.source import open_source
    from fedpeft_client.inference.catalogue import BASE
    from fedpeft_client.versions.store import AdapterStore

    known = get_args(gguf_format.Quantisation)
    if quantisation is not None and quantisation not in known:
        raise typer.BadParameter(f"--quantisation is one of {', '.join(known)}")
    chosen = cast("Quantisation", quantisation or "f16")
    box = open_box(directory)
    if adapter == BASE:
        raise UnknownAdapter(
            f"{BASE} is the base model alone, and only adapters are exported: name one of "
            "`fedpeft-client adapters list`"
        )
    version = AdapterStore(box.directory / "adapters").find(adapter)
    source = open_source(version.path, box.model.resolve(), name=version.name)
    write(source, form, out, say=program.say, quantisation=chosen)
    program.say(f"{version.name} is in {out}; export.json beside it says what was checked")
