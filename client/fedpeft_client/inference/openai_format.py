"""Requests and answers as OpenAI's clients write and read them.

https://platform.openai.com/docs/api-reference: ``chat/completions``, ``completions``,
``models`` and their streams. Must not know HTTP connections or engines. What a request
asks for and this server does not do is refused, not left out.
"""

import json
import time
import uuid
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from fedpeft.errors import BadRequest
from fedpeft_client.inference.engine import Message, Piece, Sampling, Usage

_DEFAULTS: Final[dict[str, tuple[Any, ...]]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "echo": (False,),
    "suffix": ("",),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
}
"""What this server does not do, and the values that ask for nothing of it."""


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _as_text(value: Any) -> Any:
    """Join the parts of a content that is a list of texts."""
    if not isinstance(value, list):
        return value
    parts: list[Any] = value
    if not all(isinstance(part, dict) and part.get("type") == "text" for part in parts):
        raise ValueError("only text is understood")
    if not all(isinstance(part.get("text"), str) for part in parts):
        raise ValueError("a part has no text")
    return "".join(part["text"] for part in parts)


def _as_one_text(value: Any) -> Any:
    """Take a prompt, or a list with one of them."""
    texts: list[Any] = value if isinstance(value, list) else [value]
    if len(texts) != 1 or not isinstance(texts[0], str):
        raise ValueError("give one text, not several and no numbers of tokens")
    return texts


class _Loose(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)


class _Turn(_Loose):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_as_text)]


class _StreamOptions(_Loose):
    include_usage: bool = False


class _Request(_Loose):
    model: str = Field(min_length=1, max_length=300)
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = None
    stop: Annotated[list[str] | None, BeforeValidator(_as_list)] = Field(default=None, max_length=8)
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    truncate_prompt: bool = False
    """Not OpenAI's: cut a prompt that is too long instead of refusing it."""

    @property
    def usage_in_stream(self) -> bool:
        """Whether a stream ends with what the request took."""
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, most_tokens: int) -> Sampling:
        """Return how to choose tokens; at most ``most_tokens`` of them."""
        asked = self.max_tokens
        return Sampling(
            max_tokens=most_tokens if asked is None else min(asked, most_tokens),
            temperature=self.temperature or 0.0,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=None if self.seed is None else self.seed % (1 << 32),
            stop=tuple(self.stop or ()),
            cut_prompt=self.truncate_prompt,
        )


class ChatRequest(_Request):
    """``POST /v1/chat/completions``."""

    messages: list[_Turn] = Field(min_length=1, max_length=1000)
    max_completion_tokens: int | None = Field(default=None, ge=1)

    def sampling(self, most_tokens: int) -> Sampling:
        """Return how to choose tokens; the newer name of ``max_tokens`` comes first."""
        newer = self.max_completion_tokens
        return super().sampling(most_tokens if newer is None else min(newer, most_tokens))

    def turns(self) -> list[Message]:
        """Return the conversation; a developer is what was called system before."""
        return [
            {"role": "system" if it.role == "developer" else it.role, "content": it.content}
            for it in self.messages
        ]


class TextRequest(_Request):
    """``POST /v1/completions``."""

    prompt: Annotated[list[str], BeforeValidator(_as_one_text)]


def parse_chat(body: bytes) -> ChatRequest:
    """Return what a request asks for.

    Raises:
        BadRequest: it is no JSON, or has a value that cannot be used. The sentence names
            fields, never their content.
    """
    return _parsed(ChatRequest, body)


def parse_text(body: bytes) -> TextRequest:
    """As :func:`parse_chat`."""
    return _parsed(TextRequest, body)


_Kind = TypeVar("_Kind", bound=_Request)


def _parsed(kind: type[_Kind], body: bytes) -> _Kind:
    try:
        content = json.loads(body.decode())
    except (ValueError, RecursionError):
        raise BadRequest("the request is no JSON: send an object as application/json") from None
    if not isinstance(content, dict):
        raise BadRequest("the request is no JSON object: send one as application/json")
    for name, harmless in _DEFAULTS.items():
        if (value := content.get(name)) is not None and value not in harmless:
            raise BadRequest(f"this server does not do {name}: leave it out")
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        wrong = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part) for part in wrong["loc"]) or "the request"
        # Without what only those know who know how it is checked.
        why = wrong["msg"].lower().removeprefix("value error, ").replace(" after validation", "")
        raise BadRequest(f"{where} cannot be used: {why}") from None


class AnswerFormat:
    """Writes one answer, whole or in chunks."""

    def __init__(self, model: str, *, chat: bool) -> None:
        self._chat = chat
        self._common = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, text: str, last: Piece) -> dict[str, Any]:
        """Return the answer in one object."""
        if self._chat:
            choice = {"message": {"role": "assistant", "content": text, "refusal": None}}
        else:
            choice = {"text": text}
        return {
            **self._common,
            "object": "chat.completion" if self._chat else "text_completion",
            "choices": [self._choice(choice, last)],
            "usage": last.usage and usage_format(last.usage),
        }

    def first(self) -> list[dict[str, Any]]:
        """Return what comes before the first piece."""
        if not self._chat:
            return []
        return [self._chunk([self._choice({"delta": {"role": "assistant", "content": ""}}, None)])]

    def piece(self, piece: Piece) -> dict[str, Any]:
        """Return the chunk of a piece."""
        if self._chat:
            choice = {"delta": {"content": piece.text} if piece.text else {}}
        else:
            choice = {"text": piece.text}
        return self._chunk([self._choice(choice, piece)])

    def usage(self, usage: Usage) -> dict[str, Any]:
        """Return the last chunk, which only says what the request took."""
        return {**self._chunk([]), "usage": usage_format(usage)}

    def _choice(self, content: dict[str, Any], piece: Piece | None) -> dict[str, Any]:
        finished = None if piece is None else piece.finished
        return {"index": 0, **content, "finish_reason": finished, "logprobs": None}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        return {**self._common, "object": kind, "choices": choices}


def usage_format(usage: Usage) -> dict[str, Any]:
    """Return what a request took."""
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.answer,
        "total_tokens": usage.prompt + usage.answer,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
    }


def models_format(names: list[str]) -> dict[str, Any]:
    """Return the list of models."""
    return {"object": "list", "data": [model_format(name) for name in names]}


def model_format(name: str) -> dict[str, Any]:
    """Return one model."""
    return {"id": name, "object": "model", "created": 0, "owned_by": "fedpeft"}


def error_format(text: str, code: str, *, status: int) -> dict[str, Any]:
    """Return an error as the clients of OpenAI read it."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": text, "type": kind, "param": None, "code": code}}
