"""Turn records into token ids, and say which of the tokens the loss is about.

Must not know files, models, batches or training. What it promises to those who
count privacy by record: one record becomes exactly one example.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fedpeft.data.chat import ChatTokenizer, Ids, Rendering, Tokens
from fedpeft.data.identity import person
from fedpeft.data.records import Record, RecordSet, count
from fedpeft.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Offsets are two Python integers a token, so a whole file at once costs gigabytes.
_RECORDS_AT_ONCE = 256


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class EncodedExample:
    """One record as tokens.

    ``input_ids`` is int32 and ``targets`` bool, both of shape (length,): a token
    with a true target is one that the model must predict from those before it.
    The first token never is one, so the number of loss terms is ``targets.sum()``.
    The last token always is one: what follows the last answer is left out.
    ``patient_id`` is in one spelling (see ``fedpeft.data.identity.person``).
    """

    input_ids: npt.NDArray[np.int32]
    targets: npt.NDArray[np.bool_]
    row: int
    truncated: bool
    patient_id: str | None

    def __len__(self) -> int:
        return len(self.input_ids)

    def __repr__(self) -> str:
        return f"EncodedExample(row={self.row}, tokens={len(self)}, truncated={self.truncated})"


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class EncodedSet:
    """All records of a file as tokens, in file order.

    ``truncated`` counts examples; ``tokens``, ``target_tokens`` and ``cut_tokens``
    count tokens: kept, kept as targets, and lost to truncation.
    """

    examples: tuple[EncodedExample, ...]
    truncated: int
    cut_tokens: int
    tokens: int
    target_tokens: int
    max_length: int

    def __len__(self) -> int:
        return len(self.examples)

    def __repr__(self) -> str:
        return f"EncodedSet({self.describe()!r})"

    def describe(self) -> str:
        """Say in one line how much there is and what truncation took."""
        line = (
            f"{count(len(self), 'example')}, {count(self.tokens, 'token')}, "
            f"{self.target_tokens} of them to be learnt"
        )
        if self.truncated:
            line += (
                f"; {count(self.truncated, 'example')} cut to {self.max_length} tokens, "
                f"{count(self.cut_tokens, 'token')} lost"
            )
        return line


def encode(
    records: RecordSet, tokenizer: "PreTrainedTokenizerBase", *, max_length: int
) -> EncodedSet:
    """Encode every record; the loss is about the answers only.

    Conversations are written with the tokenizer's chat template, or with
    :data:`fedpeft.data.FALLBACK_TEMPLATE` if it has none. Targets are the tokens
    of every answer and the end token that the template writes after it; where it
    writes none after the last answer, EOS is added. All of a plain text is a
    target, and EOS is added. A BOS token stands in front if the tokenizer puts
    one there by itself and the template has not written it.

    An example that is too long is cut so that it has ``max_length`` tokens:

    * the last answer keeps at least half of ``max_length``, or all of itself;
    * what stands before it loses its beginning, except for a leading BOS;
    * then the answer loses its end, and with it the token that says to stop;
    * a plain text loses its end.

    Args:
        records: as read by :func:`fedpeft.data.read_records`.
        tokenizer: a fast tokenizer.
        max_length: the most tokens an example may have, at least 2. That the
            model's context is as long is for the caller to check.

    Returns:
        One example a record, each with at least one target.

    Raises:
        ConfigError: ``max_length`` is below 2.
        DataError: the chat template refuses a conversation, or the tokenizer
            leaves nothing of a text.
        ModelError: the tokenizer or its template cannot be used for training.
    """
    if max_length < 2:
        raise ConfigError(
            f"max_length is {max_length}, which leaves no token to predict: make it 2 or more"
        )
    chat = ChatTokenizer(tokenizer)
    examples: list[EncodedExample] = []
    cut_tokens = 0
    for batch in _batches(records.records):
        for record, full in zip(batch, _encode_batch(chat, records, batch), strict=True):
            ids, targets = full.cut_to(max_length)
            if not targets.any():
                raise DataError(
                    f"cannot use {records.place(record.row)}: the tokenizer keeps nothing of its "
                    f"text: remove the {records.unit} or choose another base model"
                )
            cut = len(full.ids) - len(ids)
            cut_tokens += cut
            patient = None if record.patient_id is None else person(record.patient_id)
            examples.append(EncodedExample(ids, targets, record.row, cut > 0, patient))
    return EncodedSet(
        examples=tuple(examples),
        truncated=sum(example.truncated for example in examples),
        cut_tokens=cut_tokens,
        tokens=sum(len(example) for example in examples),
        target_tokens=sum(int(example.targets.sum()) for example in examples),
        max_length=max_length,
    )


def _batches(records: Sequence[Record]) -> Iterator[list[Record]]:
    remaining = iter(records)
    while batch := list(islice(remaining, _RECORDS_AT_ONCE)):
        yield batch


@dataclass(frozen=True, slots=True, repr=False)
class _Full:
    """An example before truncation; ``answer`` is where its last answer begins."""

    ids: Ids
    targets: npt.NDArray[np.bool_]
    answer: int
    has_bos: bool

    def cut_to(self, max_length: int) -> tuple[Ids, npt.NDArray[np.bool_]]:
        length = len(self.ids)
        if length <= max_length:
            return self.ids, self.targets
        answer_kept = min(
            length - self.answer, max((max_length + 1) // 2, max_length - self.answer)
        )
        prompt_kept = max_length - answer_kept
        keep = np.zeros(length, dtype=np.bool_)
        keep[self.answer - prompt_kept : self.answer + answer_kept] = True
        if self.has_bos and prompt_kept:
            keep[self.answer - prompt_kept] = False
            keep[0] = True
        targets = self.targets[keep]
        targets[0] = False
        return self.ids[keep], targets


def _encode_batch(chat: ChatTokenizer, records: RecordSet, batch: list[Record]) -> list[_Full]:
    renderings = [
        chat.render(record.turns, records.place(record.row)) if record.text is None else record.text
        for record in batch
    ]
    texts = [item if isinstance(item, str) else item.text for item in renderings]
    return [
        _plain_text(chat, tokens)
        if isinstance(rendering, str)
        else _conversation(chat, rendering, tokens)
        for rendering, tokens in zip(renderings, chat.tokenize(texts), strict=True)
    ]


def _plain_text(chat: ChatTokenizer, tokens: Tokens) -> _Full:
    ids = np.append(tokens.ids, np.int32(chat.require_eos()))
    # Nothing but BOS comes before the "answer", so a cut takes its end only.
    return _with_bos(chat, ids, np.ones(len(ids), dtype=np.bool_), answer=0)


def _conversation(chat: ChatTokenizer, rendering: Rendering, tokens: Tokens) -> _Full:
    targets = np.zeros(len(tokens.ids), dtype=np.bool_)
    first = end = 0
    ended = False
    for span in rendering.answers:
        first = int(np.searchsorted(tokens.ends, span.begin, side="right"))
        end = int(np.searchsorted(tokens.starts, span.text_end, side="left"))
        stop = _end_token(chat, rendering.text, tokens, end, span.text_end)
        ended = stop is not None
        end = end if stop is None else stop + 1
        targets[first:end] = True
    ids, targets = tokens.ids[:end], targets[:end]
    if not ended:
        ids = np.append(ids, np.int32(chat.require_eos()))
        targets = np.append(targets, np.True_)
    return _with_bos(chat, ids, targets, answer=first)


def _end_token(
    chat: ChatTokenizer, text: str, tokens: Tokens, index: int, text_end: int
) -> int | None:
    """Return the index of the special token that ends the answer, if one does."""
    while index < len(tokens.ids):
        if int(tokens.ids[index]) in chat.special:
            return index
        if text[text_end : int(tokens.ends[index])].strip():
            return None
        index += 1
    return None


def _with_bos(
    chat: ChatTokenizer, ids: Ids, targets: npt.NDArray[np.bool_], *, answer: int
) -> _Full:
    has_bos = chat.bos is not None and int(ids[0]) == chat.bos
    if chat.adds_bos and not has_bos:
        has_bos = True
        ids = np.concatenate([np.array([chat.bos], dtype=np.int32), ids])
        targets = np.concatenate([np.array([False]), targets])
        answer += 1
    targets[0] = False
    return _Full(ids, targets, answer, has_bos)
