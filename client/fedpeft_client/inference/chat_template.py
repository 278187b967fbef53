"""Write a conversation as the base model expects it, the way training wrote it.

Must not know tokens. Templates come with models, so they run in jinja's sandbox.
"""

import datetime
import json
from collections.abc import Sequence
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fedpeft.errors import BadRequest, ModelError
from fedpeft_client.inference.engine import Message

ROLES = ("system", "user", "assistant")


class ChatTemplate:
    """A base model's chat template; None: the one that training uses where there is none."""

    def __init__(self, template: str | None, *, bos: str, eos: str) -> None:
        """Compile it.

        Raises:
            ModelError: it is no template.
        """
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _as_json
        names: dict[str, Any] = {
            "raise_exception": _refuse,
            "strftime_now": _now,
            "bos_token": bos,
            "eos_token": eos,
        }
        environment.globals.update(names)
        if template is None:
            # Imported here: it needs NumPy, which a server can do without.
            from fedpeft.data import FALLBACK_TEMPLATE

            template = FALLBACK_TEMPLATE
        try:
            self._template = environment.from_string(template)
        except TemplateError:
            raise ModelError(
                "the base model's chat template is no valid template: correct its "
                "chat_template.jinja"
            ) from None

    def prompt(self, messages: Sequence[Message]) -> str:
        """Return the text after which the model's answer begins.

        Raises:
            BadRequest: there are no messages, one has an unknown role or no text, all are
                blank, the last one is the assistant's, or the template refuses their order.
        """
        if not messages:
            raise BadRequest("there are no messages; give at least one from the user")
        for number, message in enumerate(messages, 1):
            if message.get("role") not in ROLES or not isinstance(message.get("content"), str):
                raise BadRequest(
                    f"message {number} needs a role, one of {', '.join(ROLES)}, and a content "
                    "that is text"
                )
        if not any(message["content"].strip() for message in messages):
            raise BadRequest("all messages are empty: write what the model should answer")
        # A template ends a turn before it begins the next, and two answers on end were
        # never seen in training.
        if messages[-1]["role"] == "assistant":
            raise BadRequest(
                "the last message is the assistant's: end with one of the user's, or let a text "
                "be continued (POST /v1/completions)"
            )
        turns = [{"role": each["role"], "content": each["content"]} for each in messages]
        try:
            return self._template.render(messages=turns, add_generation_prompt=True)
        except (TemplateError, TypeError):
            # Its own message may quote the conversation.
            raise BadRequest(
                "the base model's chat template refuses this order of roles: let user and "
                "assistant alternate, the user last, and leave out the system turn if that "
                "does not help"
            ) from None


def _refuse(_message: str) -> NoReturn:
    raise TemplateError


def _now(form: str) -> str:
    return datetime.datetime.now().astimezone().strftime(form)


def _as_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)
