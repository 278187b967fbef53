"""What all engines say and do alike about prompts that are too long and names that are unknown.

Must not know how tokens are made.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

from fedpeft.errors import PromptTooLong, UnknownAdapter
from fedpeft_client.inference.engine import Message


def room(context: int) -> int:
    """Return how many tokens a prompt that is cut may have, so that a quarter is left."""
    return max(1, context - context // 4)


def cut_messages(
    messages: Sequence[Message], tokens: Callable[[Sequence[Message]], list[int]], context: int
) -> list[int]:
    """Return the tokens of a conversation, without its oldest turns if it is too long.

    The system turn and the last turn stay; turns go in pairs, so that user and assistant
    still alternate. At least a quarter of the context is left for the answer where that
    is possible. What is too long even so is returned as it is.
    """
    system = [each for each in messages if each.get("role") == "system"][:1]
    turns = [each for each in messages if each not in system]
    found = tokens(messages)
    while len(found) > room(context) and len(turns) > 2:
        turns = turns[2:]
        found = tokens([*system, *turns])
    return found


def unknown(name: str, models: Iterable[str], broken: Mapping[str, str]) -> UnknownAdapter:
    """Return the error for a name that cannot answer, with the reason if one is known."""
    if name in broken:
        return UnknownAdapter(f"the adapter {name} cannot be used: {broken[name]}")
    return UnknownAdapter(
        f"this box has no adapter {name!r} that can answer, only {', '.join(models)}: "
        "choose one of these"
    )


def too_long(tokens: int, context: int, *, cut: bool) -> PromptTooLong:
    """Return the error for a prompt that leaves no room for an answer, ``cut`` or not."""
    if cut:
        return PromptTooLong(
            f"the prompt has {tokens} tokens without its oldest turns too, and the context "
            f"{context}, in which the answer has to fit too: shorten the last turns"
        )
    return PromptTooLong(
        f"the prompt has {tokens} tokens and the context {context}, in which the answer has to "
        "fit too: shorten the prompt, or ask for it to be cut (--cut-prompt; of fedpeft-client "
        "serve: truncate_prompt)"
    )
