"""One export from the checks to the finished folder. Knows no format from the inside."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from fedpeft.gguf_format import Quantisation
from fedpeft_client.export import as_gguf, as_gguf_lora, as_merged, as_onnx, as_peft
from fedpeft_client.export.folder import new_folder
from fedpeft_client.export.formats import Format
from fedpeft_client.export.record import Written, write_record
from fedpeft_client.export.source import Source

Writer = Callable[[Source, Path, Callable[[str], None]], Written]


def export(
    source: Source,
    form: Format,
    out: Path,
    *,
    say: Callable[[str], None],
    quantisation: Quantisation = "f16",
) -> None:
    """Write ``source`` into the new folder ``out``; on any error there is no such folder.

    ``quantisation`` is that of a ``gguf`` export; ``say`` is told what happens, in sentences.

    Raises:
        StorageError: ``out`` holds something, the disk is full, or cannot be written.
        NotConvertible: the format cannot express the model.
        ModelError: the base model cannot be loaded, or is quantised where it must not be.
        ExportDiffers: what was written does not compute what the adapted model does.
        ConfigError: a library that the format needs is not installed.
    """
    writers: dict[Format, Writer] = {
        Format.peft: as_peft.write,
        Format.merged: as_merged.write,
        Format.gguf: partial(as_gguf.write, quantisation=quantisation),
        Format.gguf_lora: as_gguf_lora.write,
        Format.onnx: as_onnx.write,
    }
    with new_folder(out) as folder:
        written = writers[form](source, folder, say)
        write_record(source, form, written, folder)
