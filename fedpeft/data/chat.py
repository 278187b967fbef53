"""Write a conversation as the base model expects it, and find the answers in it.

Must not know files, truncation or training: it maps turns to text and text spans
to token spans. The one place that touches the tokenizer's API.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
from jinja2 import TemplateError

from fedpeft.data.records import Turn
from fedpeft.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids: TypeAlias = npt.NDArray[np.int32]

FALLBACK_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ 'Question: ' + m['content'] + '\\n' }}"
    "{% elif m['role'] == 'assistant' %}"
    "{{ 'Answer: ' + m['content'] + eos_token }}{% if not loop.last %}{{ '\\n' }}{% endif %}"
    "{% else %}{{ m['content'] + '\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Answer:{% endif %}"
)
"""The chat template of a tokenizer that has none.

It writes ``Question: …``, a line break, ``Answer: …`` and the EOS token. Whoever
generates with such a model must use this template too.
"""


@dataclass(frozen=True, slots=True, repr=False)
class Tokens:
    """One tokenised text: ids, and where in the text each token starts and ends."""

    ids: Ids
    starts: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class AnswerSpan:
    """An answer in a rendered conversation, in characters.

    ``begin`` is where generation would begin; ``text_begin`` and ``text_end``
    bound the answer itself, without what the template writes after it.
    """

    begin: int
    text_begin: int
    text_end: int


@dataclass(frozen=True, slots=True, repr=False)
class Rendering:
    """A conversation as the template writes it, and its answers in order."""

    text: str
    answers: tuple[AnswerSpan, ...]


class ChatTokenizer:
    """A tokenizer and its chat template, as far as encoding needs them.

    ``bos`` and ``eos`` are the ids of these tokens, or None. ``adds_bos`` says
    whether the tokenizer puts BOS in front of a text by itself.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Look at the special tokens.

        Raises:
            ModelError: it is not a fast tokenizer, so it cannot say which token
                stands for which characters; or its chat template does not work.
        """
        self._tokenizer: Any = tokenizer
        if not self._tokenizer.is_fast:
            raise ModelError(
                "the base model's tokenizer is not a fast one and cannot say where its tokens "
                "stand in the text: use a base model with a tokenizer.json"
            )
        self._template: str | None = None if self._tokenizer.chat_template else FALLBACK_TEMPLATE
        self.eos: int | None = self._tokenizer.eos_token_id
        self.bos: int | None = self._tokenizer.bos_token_id
        first: list[int] = self._tokenizer("x", add_special_tokens=True)["input_ids"]
        self.adds_bos: bool = self.bos is not None and first[0] == self.bos
        self.special: frozenset[int] = frozenset(self._tokenizer.all_special_ids) | frozenset(
            index for index, token in self._tokenizer.added_tokens_decoder.items() if token.special
        )
        if self._render((Turn("user", "x"), Turn("assistant", "y")), for_generation=False) is None:
            raise ModelError(
                "the base model's chat template cannot write a question and an answer: "
                "correct its chat_template.jinja or use another base model"
            )

    def require_eos(self) -> int:
        """Return the EOS id, without which a model cannot learn to stop.

        Raises:
            ModelError: there is none.
        """
        if self.eos is None:
            raise ModelError(
                "the base model's tokenizer has no EOS token, so the model could not learn to "
                "stop: set eos_token in its tokenizer_config.json"
            )
        return self.eos

    def tokenize(self, texts: Sequence[str]) -> list[Tokens]:
        """Tokenise each text as it stands: no token is added before or after."""
        if not texts:
            return []
        batch = self._tokenizer(
            list(texts),
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            padding=False,
            truncation=False,
            verbose=False,  # its warning about length: truncation is counted elsewhere
        )
        found: list[Tokens] = []
        for ids, offsets in zip(batch["input_ids"], batch["offset_mapping"], strict=True):
            bounds = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
            found.append(Tokens(np.asarray(ids, dtype=np.int32), bounds[:, 0], bounds[:, 1]))
        return found

    def _render(self, turns: Sequence[Turn], *, for_generation: bool) -> str | None:
        """Return the conversation as text, or None if the template refuses it."""
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        try:
            text: str = self._tokenizer.apply_chat_template(
                messages,
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=for_generation,
            )
        except (TemplateError, TypeError):
            # Its message is the template author's and can quote the conversation.
            return None
        return text

    def render(self, turns: Sequence[Turn], place: str) -> Rendering:
        """Write the conversation once, and find every answer in it.

        The answers are found by rendering the conversation a second time with
        a placeholder for each, which needs no assumption about the template: some
        write a turn differently once another follows. An answer begins where
        generation would, if the template starts the conversation the same way
        when it asks for that answer; otherwise at its first character.

        Args:
            turns: the conversation.
            place: file and line, for error messages.

        Raises:
            DataError: the template refuses this conversation.
            ModelError: the template does not write every answer unchanged.
        """
        text = self._render(turns, for_generation=False)
        if text is None:
            raise DataError(f"cannot use {place}: {self._refusal(turns)}")
        bounds = self._answer_bounds(turns, text)
        if bounds is None:
            raise ModelError(
                f"the base model's chat template does not write every answer once and unchanged "
                f"(seen at {place}), so the answers cannot be told from the questions: "
                f"choose another base model or correct its chat template"
            )
        spans: list[AnswerSpan] = []
        earliest = 0
        answers = (index for index, turn in enumerate(turns) if turn.role == "assistant")
        for index, (begin, end) in zip(answers, bounds, strict=True):
            prompt = self._render(turns[:index], for_generation=True) if index else None
            starts_alike = prompt is not None and text.startswith(prompt)
            generated = len(prompt) if prompt is not None and starts_alike else begin
            spans.append(
                AnswerSpan(generated if earliest <= generated <= begin else begin, begin, end)
            )
            earliest = end
        return Rendering(text, tuple(spans))

    def _answer_bounds(self, turns: Sequence[Turn], text: str) -> list[tuple[int, int]] | None:
        mark = "\ue000"
        while mark in text:
            mark += "\ue001"
        marked = [Turn("assistant", mark) if t.role == "assistant" else t for t in turns]
        frame = self._render(marked, for_generation=False)
        answers = [turn.text for turn in turns if turn.role == "assistant"]
        parts = frame.split(mark) if frame is not None else []
        if len(parts) != len(answers) + 1 or not text.startswith(parts[0]):
            return None
        bounds: list[tuple[int, int]] = []
        position = len(parts[0])
        for answer, after in zip(answers, parts[1:], strict=True):
            # Many templates trim the spaces around an answer.
            forms = (answer, answer.strip(), answer.rstrip(), answer.lstrip())
            written = next((f for f in forms if text.startswith(f + after, position)), None)
            if written is None:
                return None
            bounds.append((position, position + len(written)))
            position += len(written) + len(after)
        return bounds if position == len(text) else None

    def _refusal(self, turns: Sequence[Turn]) -> str:
        without_system = [turn for turn in turns if turn.role != "system"]
        if len(without_system) < len(turns) and (
            self._render(without_system, for_generation=False) is not None
        ):
            return (
                "the base model's chat template accepts no system turn: remove the system turns "
                "or choose another base model"
            )
        return (
            "the base model's chat template refuses this order of roles: let user and assistant "
            "alternate, starting with the user"
        )
