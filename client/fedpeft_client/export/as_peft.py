"""The adapter alone, as a stock PEFT directory."""

from collections.abc import Callable
from pathlib import Path

import torch

from fedpeft.adapters import load_adapter, save_adapter
from fedpeft.errors import ExportDiffers
from fedpeft_client.export.record import Check, Written
from fedpeft_client.export.source import Source


def write(source: Source, folder: Path, say: Callable[[str], None]) -> Written:
    """Write the adapter into ``folder``, and read it again.

    Its configuration names the base model without the path that it has on this machine.

    Raises:
        ExportDiffers: what was read is another adapter.
        StorageError: a file cannot be written.
    """
    say("writing the adapter")
    save_adapter(source.state, source.settings, folder, base_name=source.base.name)
    if not torch.equal(load_adapter(folder, source.state.schema).values, source.state.values):
        raise ExportDiffers(
            "the adapter that was written is read as another one: nothing was exported; check the "
            "disk, and please report it"
        )
    return Written(checks=(Check(what="the adapter, read again, is the same"),), details={})
