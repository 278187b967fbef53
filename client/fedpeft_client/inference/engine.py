"""What an engine does: continue a text or a conversation with one of the adapters of the box.

Must not know how: no library that computes is imported here.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

from fedpeft.errors import BadRequest

Message: TypeAlias = Mapping[str, str]
"""One turn: ``role`` ("system", "user" or "assistant") and ``content``."""

Finish: TypeAlias = Literal["stop", "length"]
"""Why an answer ended: the model or a stop text ended it, or ``max_tokens`` or the context did."""

_MOST_STOPS = 8
_LONGEST_STOP = 256
"""Characters: each token is compared with every beginning of a stop text."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen, and when to stop.

    The default temperature of 0 always takes the likeliest token, so that the same
    question gets the same answer. ``max_tokens`` None: until the context is full.
    ``seed`` None: a new one each time. ``cut_prompt`` leaves out the beginning of a
    prompt that is longer than the context, which is an error without it: the oldest
    turns of a conversation except its system turn, or the first tokens of a text.
    """

    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    cut_prompt: bool = False

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            BadRequest: one of the values is outside of its range.
        """
        if self.max_tokens is not None and self.max_tokens < 1:
            raise BadRequest(f"max_tokens is {self.max_tokens}; ask for at least 1 token")
        if not 0 <= self.temperature <= 2:
            raise BadRequest(f"temperature is {self.temperature:g}; choose one from 0 to 2")
        if not 0 < self.top_p <= 1:
            raise BadRequest(f"top_p is {self.top_p:g}; choose one above 0 and at most 1")
        if self.seed is not None and not 0 <= self.seed < 1 << 32:
            raise BadRequest(f"seed is {self.seed}; choose one from 0 to {(1 << 32) - 1}")
        if len(self.stop) > _MOST_STOPS:
            raise BadRequest(f"stop has {len(self.stop)} texts; give at most {_MOST_STOPS}")
        if (longest := max(map(len, self.stop), default=0)) > _LONGEST_STOP:
            raise BadRequest(
                f"stop has a text of {longest} characters; give at most {_LONGEST_STOP}"
            )
        if not all(self.stop):
            raise BadRequest("stop has an empty text, which would end every answer: leave it out")


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request: of the prompt, how many of those were still cached, of the answer."""

    prompt: int
    cached: int
    answer: int


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an answer. The last one says why the answer ended and what it took."""

    text: str
    finished: Finish | None = None
    usage: Usage | None = None


class Answer(Protocol):
    """The pieces of one answer, as they come."""

    @property
    def model(self) -> str:
        """The version that answers ("round-7"), or "base"; it stays the same to the end."""
        ...

    def __iter__(self) -> Iterator[Piece]: ...

    def __next__(self) -> Piece:
        """Wait for the next piece.

        Raises:
            InferenceError: the engine failed or was closed.
        """
        ...

    def gathered(self, pause_s: float) -> Iterator[Piece]:
        """Yield the first piece at once, then what has come, ``pause_s`` seconds apart.

        Raises:
            InferenceError: as above.
        """
        ...

    def close(self) -> None:
        """Stop the generation if it still runs; may be called from any thread, and again."""
        ...


class Engine(Protocol):
    """A base model with any number of adapters. All methods may be called from any thread."""

    @property
    def description(self) -> str:
        """What computes, and why that: one sentence for people."""
        ...

    @property
    def context(self) -> int:
        """The most tokens that a prompt and its answer may have together."""
        ...

    @property
    def default(self) -> str:
        """The version in use: what answers where no model is named."""
        ...

    def models(self) -> tuple[str, ...]:
        """Return what can answer: "base" and the names of the versions."""
        ...

    def chat(
        self, messages: Sequence[Message], *, model: str | None = None, options: Sampling
    ) -> Answer:
        """Begin the answer to a conversation; ``model`` None is the version in use.

        A version that is chosen here finishes its answer, whatever happens to the
        catalogue meanwhile.

        Raises:
            UnknownAdapter: there is no such version, or it was removed.
            BadRequest: the conversation says nothing, or ends with an answer, or the base
                model's chat template refuses the roles.
            PromptTooLong: the prompt leaves no room for an answer in the context.
        """
        ...

    def complete(self, prompt: str, *, model: str | None = None, options: Sampling) -> Answer:
        """Begin the continuation of a text as it stands; otherwise as :meth:`chat`."""
        ...

    def refresh(self) -> None:
        """Read the catalogue now, and return when its adapters can be used.

        An adapter that cannot be loaded is left out; asking for it says why.
        """
        ...

    def close(self) -> None:
        """End running answers with an error and free the memory."""
        ...
