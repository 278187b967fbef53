"""What goes with a model's weights in every format: tokenizer, chat template, licence."""

import json
import shutil
from pathlib import Path

from transformers import PreTrainedTokenizerBase

_TOKENIZER = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
_LICENCE = ("LICENSE*", "LICENCE*", "NOTICE*")
"""Most base models may be passed on only together with these."""


def copy_tokenizer(
    base: Path, tokenizer: PreTrainedTokenizerBase, embeddings: int, folder: Path
) -> None:
    """Put the base model's tokenizer and chat template into ``folder``.

    A directory's files are copied as they are, as saving them anew can change them; from a
    ``.gguf`` file the ``tokenizer`` that was read is saved, without tokens for which the
    model has none of its ``embeddings``: transformers puts its own beyond a GGUF's.

    Raises:
        OSError: a file cannot be read or written.
    """
    if base.is_dir():
        for name in _TOKENIZER:
            if (base / name).is_file():
                shutil.copyfile(base / name, folder / name)
        return
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer.json"
    rules = json.loads(path.read_text("utf-8"))
    rules["added_tokens"] = [it for it in rules["added_tokens"] if it["id"] < embeddings]
    path.write_text(json.dumps(rules, ensure_ascii=False), "utf-8")


def copy_licence(base: Path, folder: Path) -> None:
    """Put the base model's licence into ``folder``, if one lies beside its weights.

    Raises:
        OSError: a file cannot be read or written.
    """
    beside = base if base.is_dir() else base.parent
    for pattern in _LICENCE:
        for path in sorted(beside.glob(pattern)):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)
