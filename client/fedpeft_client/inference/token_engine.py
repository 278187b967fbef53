"""What engines share: a conversation or a text becomes tokens, cut if that was asked for."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from fedpeft.errors import BadRequest
from fedpeft_client.inference.answers import QueuedAnswer
from fedpeft_client.inference.chat_template import ChatTemplate
from fedpeft_client.inference.engine import Message, Sampling
from fedpeft_client.inference.prompts import cut_messages, room


class TokenEngine(ABC):
    """The part of :class:`fedpeft_client.inference.engine.Engine` in front of the tokens.

    ``end`` is the text that ends an answer; an empty prompt is continued from there.
    """

    context: int

    def __init__(self, template: ChatTemplate, end: str) -> None:
        self._template = template
        self._end = end

    def chat(
        self, messages: Sequence[Message], *, model: str | None = None, options: Sampling
    ) -> QueuedAnswer:
        """Begin the answer to a conversation.

        Raises:
            UnknownAdapter, BadRequest, PromptTooLong: as the protocol says.
        """

        def tokens_of(kept: Sequence[Message]) -> list[int]:
            return self._tokens(_writable(self._template.prompt(kept)))

        if options.cut_prompt:
            tokens = cut_messages(messages, tokens_of, self.context)
        else:
            tokens = tokens_of(messages)
        return self._begin(tokens, model, options)

    def complete(self, prompt: str, *, model: str | None = None, options: Sampling) -> QueuedAnswer:
        """Begin the continuation of a text.

        Raises:
            UnknownAdapter, BadRequest, PromptTooLong: as the protocol says.
        """
        tokens = self._tokens(_writable(prompt)) or self._tokens(self._end)
        if options.cut_prompt:
            tokens = tokens[-room(self.context) :]
        return self._begin(tokens, model, options)

    @abstractmethod
    def _tokens(self, text: str) -> list[int]:
        """Return the tokens of a text, as in training."""

    @abstractmethod
    def _begin(self, tokens: list[int], model: str | None, options: Sampling) -> QueuedAnswer:
        """Begin to continue ``tokens``."""


def _writable(text: str) -> str:
    """Return a text that is one.

    Raises:
        BadRequest: it has half a character, as bytes in another encoding than UTF-8 become.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRequest("the text is no valid Unicode: write it in UTF-8") from None
    return text
