"""The tokenizer in a GGUF file, cutting text as llama.cpp cuts it.

transformers rebuilds it from the vocabulary, but does not know every way to split text.
"""

import json
from pathlib import Path
from typing import Any, cast

from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fedpeft.errors import ModelError, NotConvertible
from fedpeft.gguf_format.header import read_header

_REBUILT = ("default", "gpt-2", "llama-bpe", "qwen2", "tekken", "gpt-4o", "dbrx")
_DIGIT_BY_DIGIT = "smollm"


def load_gguf_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a GGUF file.

    Raises:
        NotConvertible: its way to split text is not known here.
        ModelError: it is damaged.
    """
    header = read_header(path)
    metadata = header.metadata
    kind = metadata.get("tokenizer.ggml.model")
    split = metadata.get("tokenizer.ggml.pre", "default")
    if (kind, split) != ("llama", "default") and (
        kind != "gpt2" or split not in (*_REBUILT[1:], _DIGIT_BY_DIGIT)
    ):
        raise NotConvertible(
            f"the tokenizer in {path} ({kind}, {split}) cannot be rebuilt for training; use the "
            "model's directory of transformers"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path.parent, gguf_file=path.name, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the tokenizers library raises nothing more exact
        raise ModelError(
            f"the tokenizer in {path} cannot be read ({type(error).__name__}); copy the file again"
        ) from error
    if split == _DIGIT_BY_DIGIT:
        backend = cast("Any", tokenizer).backend_tokenizer
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    count = header.tensors["token_embd.weight"].shape[0]
    return _without_strangers(cast("PreTrainedTokenizerBase", tokenizer), count)


def _without_strangers(tokenizer: PreTrainedTokenizerBase, count: int) -> PreTrainedTokenizerBase:
    """Take away tokens that the model has no embedding for: transformers adds one of GPT-2."""
    if len(tokenizer) <= count:
        return tokenizer
    content = json.loads(cast("Any", tokenizer).backend_tokenizer.to_str())
    content["added_tokens"] = [each for each in content["added_tokens"] if each["id"] < count]
    names: dict[str, Any] = tokenizer.special_tokens_map
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)),
        chat_template=tokenizer.chat_template,
        **names,
    )
