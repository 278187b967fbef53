"""The adapter alone as a LoRA GGUF, which llama.cpp puts beside a base model in GGUF."""

from collections.abc import Callable
from pathlib import Path

from fedpeft.errors import ExportDiffers
from fedpeft.gguf_format import read_header, write_adapter
from fedpeft_client.export.record import Check, Written
from fedpeft_client.export.source import Source

ADAPTER_FILE = "adapter.gguf"


def write(source: Source, folder: Path, say: Callable[[str], None]) -> Written:
    """Convert the adapter into ``folder``, and read its header again.

    Raises:
        NotConvertible: llama.cpp cannot run the architecture.
        ExportDiffers: the file is not what it should be.
        StorageError: a file cannot be written.
    """
    say("converting the adapter to GGUF")
    write_adapter(source.adapter, source.base, folder / ADAPTER_FILE, lineage=source.lineage)
    found = read_header(folder / ADAPTER_FILE)
    if not found.is_adapter or found.fingerprint != source.fingerprint:
        raise ExportDiffers(
            "the GGUF file is not read as an adapter of its base model: nothing was exported; "
            "please report it"
        )
    header = Check(what="the GGUF header, read again, and the place of every tensor")
    return Written(checks=(header,), details={})
