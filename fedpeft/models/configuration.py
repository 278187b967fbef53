"""The configuration of a base model: of a directory, or told from the header of a GGUF file."""

from pathlib import Path
from typing import Any

from transformers import AutoConfig

from fedpeft.gguf_format.reading import settings_in
from fedpeft.weight_files import is_gguf


def configuration(base: Path) -> Any:
    """Return the transformers configuration; whatever transformers raises is passed on.

    Raises:
        ModelError: a GGUF file is damaged, or not of an architecture that can be trained.
    """
    if is_gguf(base):
        return AutoConfig.for_model(**settings_in(base))
    # Said aloud, for the default is to ask at the terminal whether to run the model's code.
    return AutoConfig.from_pretrained(base, local_files_only=True, trust_remote_code=False)
