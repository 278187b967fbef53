"""What is read of a base model's directory: configuration, tokenizer, and mapped weights."""

import contextlib
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from fedpeft.errors import ModelError
from fedpeft.weight_files import weight_files

if TYPE_CHECKING:
    import torch

_COPY_AGAIN = "copy the whole model directory again"


def load_config(directory: Path) -> Any:
    """Return the transformers configuration of a directory.

    Raises:
        ModelError: there is none, or it is damaged.
    """
    from transformers import AutoConfig  # takes seconds, and reading a header needs none

    try:
        return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the library raises nothing more exact
        raise ModelError(
            f"the config.json in {directory} cannot be read ({type(error).__name__}); {_COPY_AGAIN}"
        ) from error


def load_tokenizer(directory: Path) -> Any:
    """Return the transformers tokenizer of a directory, as training uses it.

    Raises:
        ModelError: there is none, or it is damaged.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the tokenizers library raises nothing more exact
        raise ModelError(
            f"the tokenizer in {directory} cannot be read ({type(error).__name__}); {_COPY_AGAIN}"
        ) from error


class Weights:
    """The weights of a directory by name; each is read from the mapped file when asked for."""

    def __init__(self, files: Mapping[str, Any]) -> None:
        self._files = files

    @classmethod
    @contextlib.contextmanager
    def opened(cls, directory: Path) -> Generator["Weights"]:
        """Map all weight files of ``directory``.

        Raises:
            ModelError: there are none, or one is damaged.
        """
        paths = weight_files(directory)
        if not paths:
            raise ModelError(f"{directory} has no *.safetensors weights; {_COPY_AGAIN}")
        files: dict[str, Any] = {}
        with contextlib.ExitStack() as stack:
            for path in paths:
                try:
                    file = stack.enter_context(safe_open(path, framework="pt"))
                except (OSError, SafetensorError) as error:
                    raise ModelError(
                        f"{path} cannot be read as weights ({type(error).__name__}); {_COPY_AGAIN}"
                    ) from None
                files |= dict.fromkeys(file.keys(), file)
            yield cls(files)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor, by name in sorted order."""
        return {
            name: tuple(self._files[name].get_slice(name).get_shape())
            for name in sorted(self._files)
        }

    def tensor(self, name: str) -> "torch.Tensor":
        """Return one tensor, of which only what is read comes into memory."""
        return self._files[name].get_tensor(name)
