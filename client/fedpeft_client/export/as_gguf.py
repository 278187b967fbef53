"""The adapted model as one GGUF file for llama.cpp and what is built on it."""

import tempfile
from collections.abc import Callable
from pathlib import Path

from fedpeft.errors import ExportDiffers, ModelError
from fedpeft.gguf_format import Quantisation, read_header, write_base
from fedpeft_client.export.as_merged import write_model
from fedpeft_client.export.companions import copy_licence
from fedpeft_client.export.record import Check, Written
from fedpeft_client.export.source import Source

MODEL_FILE = "model.gguf"


def write(
    source: Source, folder: Path, say: Callable[[str], None], *, quantisation: Quantisation
) -> Written:
    """Merge in full precision, convert the result into ``folder``, and read its header again.

    Raises:
        NotConvertible: llama.cpp cannot run the architecture or its tokenizer.
        ModelError: the base model cannot be loaded, or is quantised.
        ExportDiffers: the merged model, or the file, is not what it should be.
        StorageError, OSError: the disk is full, or the folder cannot be written.
    """
    # Inside the export's own folder: it is as large as the model, and a system's folder for
    # temporary files is often in memory.
    with tempfile.TemporaryDirectory(prefix=".merged.", dir=folder) as name:
        merged = Path(name)
        check = write_model(source, merged, say, also_needed=1.0)
        say(f"converting to GGUF ({quantisation})")
        try:
            write_base(merged, folder / MODEL_FILE, quantisation)
        except ModelError as error:
            # What cannot be converted of it is the base model's.
            raise type(error)(str(error).replace(str(merged), str(source.base))) from error
    copy_licence(source.base, folder)
    found = read_header(folder / MODEL_FILE)
    if found.quantisation != quantisation or found.is_adapter:
        raise ExportDiffers(
            f"the GGUF file is read as {found.quantisation}, not {quantisation}: nothing was "
            "exported; please report it"
        )
    header = Check(what="the GGUF header, read again, and the place of every tensor")
    return Written(checks=(check, header), details={"quantisation": quantisation})
