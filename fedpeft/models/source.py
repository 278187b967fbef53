"""Where a base model lies: a local directory or GGUF file, the embedded one, or (if allowed) a hub.

Loads nothing; only checks that the files which loading needs are there.
"""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

from huggingface_hub.errors import StrictDataclassError

from fedpeft.errors import ModelError
from fedpeft.gguf_format.header import read_header
from fedpeft.offline import ALLOW_HUB, hub_allowed
from fedpeft.weight_files import is_gguf, weight_files

EMBEDDED = "embedded"
NOT_A_MODEL = (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError)
"""What transformers raises over a ``config.json`` that it cannot use."""


def resolve_base(base: str, *, relative_to: Path) -> Path:
    """Return the directory or GGUF file of ``base``; relative paths count from ``relative_to``.

    Raises:
        ModelError: there is no such directory, or it lacks configuration, tokenizer
            or safetensors weights; or the GGUF file is damaged or holds an adapter.
    """
    if base == EMBEDDED:
        directory = Path(str(files("fedpeft") / "demo" / "base"))
    else:
        directory = (relative_to / _home_expanded(base)).resolve()
        if not directory.is_dir() and not is_gguf(directory):
            directory = _fetch(base, directory)
    require_complete(directory)
    return directory


def _home_expanded(base: str) -> Path:
    try:
        return Path(base).expanduser()
    except RuntimeError:  # there is no such user; the path as it stands does not exist either
        return Path(base)


def require_complete(directory: Path) -> None:
    """Check that a model directory, or a GGUF file, can be used.

    Raises:
        ModelError: says what is missing and what to copy there.
    """
    if is_gguf(directory):
        if read_header(directory).is_adapter:
            raise ModelError(f"{directory} is an adapter and no base model; name a base model")
        return
    if not directory.is_dir():
        raise ModelError(f"the base model directory {directory} does not exist; name one that does")
    if not (directory / "config.json").is_file():
        raise ModelError(f"{directory} has no config.json; copy the whole model directory there")
    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise ModelError(
            f"{directory} has no tokenizer (tokenizer.json); copy the whole model directory there"
        )
    if not weight_files(directory):
        raise ModelError(
            f"{directory} has no *.safetensors weights; convert the model to safetensors "
            "(pickled .bin files can run code and are not read)"
        )


def context_length(directory: Path) -> int | None:
    """Return the most tokens that the model can read at once, or None if it does not say."""
    if is_gguf(directory):
        return read_header(directory).context_length
    config = cast("dict[str, Any]", json.loads((directory / "config.json").read_text("utf-8")))
    inner = cast("dict[str, Any]", config.get("text_config", config))
    length = inner.get("max_position_embeddings")
    return length if isinstance(length, int) else None


def _fetch(base: str, directory: Path) -> Path:
    looks_like_hub_id = base.count("/") == 1 and not base.startswith((".", "/", "~"))
    if not looks_like_hub_id:
        raise ModelError(f"the base model directory {directory} does not exist; name one that does")
    if not hub_allowed():
        raise ModelError(
            f"the base model {base!r} is no local directory ({directory}), and hubs are off; copy "
            f"the model here, or set {ALLOW_HUB}=1 to let this machine download it"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        patterns = ["*.json", "*.safetensors", "*.model", "*.jinja"]
        return Path(snapshot_download(base, allow_patterns=patterns))
    except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise ModelError(
            f"the base model {base!r} could not be downloaded ({type(error).__name__}); "
            "check the network, or copy the model directory here"
        ) from None
