"""A tokenizer of transformers as GGUF metadata: tokens, merges or scores, special ones, template.

Which of llama.cpp's ways to split text fits is found from the tokenizer's own rules, never from
the model's name; where none fits, the tokenizer is refused. Text that is not in Unicode's
composed form (NFC) is the one thing that is cut otherwise, where the tokenizer composes it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from gguf import TokenType

from fedpeft.data import FALLBACK_TEMPLATE
from fedpeft.errors import NotConvertible
from fedpeft.gguf_format.layout import Value

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*",
)
_CASED_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS: Mapping[tuple[str, bool], str] = {
    (rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_REST}", True): "llama-bpe",
    (rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_REST}", False): "dbrx",
    (rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}|{_REST}", False): "qwen2",
    (rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}|{_CASED_REST}", True): "tekken",
    (
        rf"{_CASED[0]}{_CONTRACTIONS}?|{_CASED[1]}{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_CASED_REST}",
        False,
    ): "gpt-4o",
}
"""llama.cpp's name of a way to split text, by its regular expression and ``ignore_merges``."""

_STRIPPING_NAME, _OTHER_NAME = "phi-3", "base"
_STRIPPING_TOKENS = {"<unk>", "<s>", "</s>", "<|endoftext|>"}


def vocabulary_name(model_type: str, rules: Mapping[str, Any]) -> str:
    """Return the name that a file must have for llama.cpp to treat its special tokens rightly.

    It strips spaces after special tokens in models whose name has "phi-3" in it, and fails to
    load them if they lack the tokens of Phi-3. So the name says that, and nothing else.
    """
    strips = any(added["rstrip"] for added in rules["added_tokens"])
    known = {added["content"] for added in rules["added_tokens"]}
    fits = model_type == "phi3" and strips and known >= _STRIPPING_TOKENS
    return _STRIPPING_NAME if fits else _OTHER_NAME


def vocabulary_metadata(tokenizer: Any, rules: Mapping[str, Any], size: int) -> dict[str, Value]:
    """Return the metadata of ``tokenizer``, whose ``tokenizer.json`` is ``rules``.

    ``size`` is the number of the model's embeddings; there may be more than tokens.

    Raises:
        NotConvertible: llama.cpp would cut some texts into other tokens.
    """
    model = rules["model"]
    if model["type"] != "BPE":
        raise _refuse(f"its model is {model['type']}")
    if model.get("dropout") or model.get("continuing_subword_prefix"):
        raise _refuse("its merges are at random or its tokens have prefixes")
    texts, types = _tokens(rules, size)
    sentencepiece = bool(model.get("byte_fallback"))
    # Llama 3's and GPT's kind writes bytes as letters, SentencePiece's writes spaces as "▁".
    chats = bool(tokenizer.chat_template)
    own = _sentencepiece(rules, texts, chats) if sentencepiece else _byte_level(rules)
    if sentencepiece and (unknown := tokenizer.unk_token_id) is not None:
        types[unknown] = TokenType.UNKNOWN
    return {
        **own,
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": [int(each) for each in types],
        **_special(tokenizer, size),
        "tokenizer.chat_template": _template(tokenizer),
    }


def _refuse(why: str) -> NotConvertible:
    return NotConvertible(
        f"the base model's tokenizer cannot be written as GGUF ({why}); run the model through "
        "transformers"
    )


def _tokens(rules: Mapping[str, Any], size: int) -> tuple[list[str], list[TokenType]]:
    model = rules["model"]
    sentencepiece = bool(model.get("byte_fallback"))
    texts = [f"[PAD{index}]" for index in range(size)]
    types = [TokenType.UNUSED] * size
    if max([*model["vocab"].values(), *(it["id"] for it in rules["added_tokens"])]) >= size:
        raise _refuse(f"it has tokens beyond the model's {size} embeddings")
    for text, index in model["vocab"].items():
        is_byte = sentencepiece and len(text) == 6 and text.startswith("<0x")
        texts[index], types[index] = text, TokenType.BYTE if is_byte else TokenType.NORMAL
    for added in rules["added_tokens"]:
        text, special = added["content"], added["special"]
        # llama.cpp looks for these before it turns spaces into "▁".
        texts[added["id"]] = text if special or not sentencepiece else text.replace("▁", " ")
        types[added["id"]] = TokenType.CONTROL if special else TokenType.USER_DEFINED
    if len(set(texts)) < size:
        raise _refuse("two of its tokens have the same text")
    return texts, types


def _pairs(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the merges; older files write them as one text with a space between."""
    merges: Sequence[Any] = model["merges"]
    split = (each.split(" ", 1) if isinstance(each, str) else each for each in merges)
    return [(left, right) for left, right in split]


def _sentencepiece(rules: Mapping[str, Any], texts: Sequence[str], chats: bool) -> dict[str, Value]:
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(_pairs(rules["model"])):
        ranks.setdefault(left + right, rank)
    # llama.cpp joins the pair whose token has the highest score, BPE the one of the first merge.
    scores = [-float(ranks.get(text, 0)) for text in texts]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.add_space_prefix": _has_space_prefix(rules, chats),
    }


def _steps(rules: Mapping[str, Any], step: str, inside: str) -> list[Mapping[str, Any]]:
    found = rules.get(step)
    if found is None:
        return []
    return list(found[inside]) if found["type"] == "Sequence" else [found]


def _has_space_prefix(rules: Mapping[str, Any], chats: bool) -> bool:
    """Say whether a space goes before each text between special tokens.

    llama.cpp has no tokenizer that puts one before the first text alone: chats begin with a
    special token, so there it never does.
    """
    steps = _steps(rules, "normalizer", "normalizers")
    steps += _steps(rules, "pre_tokenizer", "pretokenizers")
    prefix = False
    for step in steps:
        if step["type"] == "Metaspace":
            scheme = step.get("prepend_scheme", "always")
            prefix = scheme == "always" or (scheme == "first" and not chats)
        elif step["type"] == "Prepend":
            prefix = True
        elif step["type"] == "Split" and step["pattern"].get("String") != " ":
            raise _refuse("it splits text in its own way")
        elif step["type"] not in ("Replace", "Split"):
            raise _refuse(f"it has the step {step['type']}")
    return prefix


def _byte_level(rules: Mapping[str, Any]) -> dict[str, Value]:
    # llama.cpp has no normalisation: texts in the usual composed form need none.
    for step in _steps(rules, "normalizer", "normalizers"):
        if step["type"] != "NFC":
            raise _refuse(f"it changes text by {step['type']}")
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _split_name(rules),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in _pairs(rules["model"])],
    }


def _split_name(rules: Mapping[str, Any]) -> str:
    steps = _steps(rules, "pre_tokenizer", "pretokenizers")
    kinds = [step["type"] for step in steps]
    last = steps[-1] if steps else {}
    model = rules["model"]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        raise _refuse("it is not byte-level, or puts a space before each text")
    own_split = bool(last.get("use_regex", True))
    if kinds == ["ByteLevel"] and own_split:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and own_split:
        if steps[0]["individual_digits"]:
            return "smollm"
        if _never_joins_digits(model):
            return "gpt-2"
    if kinds == ["Split", "ByteLevel"] and not own_split:
        pattern = steps[0]["pattern"].get("Regex")
        name = _SPLITS.get((pattern, bool(model.get("ignore_merges"))))
        if name is not None:
            return name
    raise _refuse("it splits text in a way that llama.cpp does not have")


def _never_joins_digits(model: Mapping[str, Any]) -> bool:
    """Say whether splitting before and after numbers changes nothing, for no merge joins them.

    Such a split also parts spaces before a number, so spaces must not be joined either.
    """
    spaces = {"Ġ", "Ċ", "ĉ", "č"}
    for pair in _pairs(model):
        text = "".join(pair)
        digits = [letter.isdigit() for letter in text]
        if (any(digits) and not all(digits)) or sum(letter in spaces for letter in text) > 1:
            return False
    return True


def _special(tokenizer: Any, size: int) -> dict[str, Value]:
    found = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
    }
    values: dict[str, Value] = {
        f"tokenizer.ggml.{name}_token_id": index
        for name, index in found.items()
        if index is not None and index < size
    }
    # As in training: whether the tokenizer itself puts the token there.
    written: list[int] = tokenizer("x", add_special_tokens=True)["input_ids"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    values["tokenizer.ggml.add_bos_token"] = bos is not None and written[0] == bos
    values["tokenizer.ggml.add_eos_token"] = eos is not None and written[-1] == eos
    return values


def _template(tokenizer: Any) -> str:
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return template or FALLBACK_TEMPLATE
