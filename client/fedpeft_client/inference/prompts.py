"""What all engines say and do alike: prompts that are too long, names that are unknown, context.

Must not know how tokens are made.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

from fedpeft.errors import PromptTooLong, UnknownAdapter
from fedpeft_client.inference.catalogue import BASE
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
    found = tokens(messages)
    if len(found) <= room(context):
        return found
    first = next((at for at, each in enumerate(messages) if each.get("role") == "system"), None)
    system = [] if first is None else [messages[first]]
    turns = [each for at, each in enumerate(messages) if at != first]
    # The fewest pairs, found by halving: a thousand turns are made tokens of ten times.
    fewest, most = 1, (len(turns) - 1) // 2
    if most < 1:
        return found
    found = tokens([*system, *turns[2 * most :]])
    while fewest < most:
        middle = (fewest + most) // 2
        shorter = tokens([*system, *turns[2 * middle :]])
        if len(shorter) <= room(context):
            found, most = shorter, middle
        else:
            fewest = middle + 1
    return found


def unknown(name: str, models: Iterable[str], broken: Mapping[str, str]) -> UnknownAdapter:
    """Return the error for a name that cannot answer, with the reason if one is known.

    What can be asked for instead is called by other names in other places, so whoever
    shows the error adds them.
    """
    if name in broken:
        return UnknownAdapter(f"the adapter {name} cannot be used: {broken[name]}")
    if not set(models) - {BASE}:
        return UnknownAdapter(
            f"no round has arrived on this box yet, so it has no adapter {name!r}"
        )
    return UnknownAdapter(f"this box has no adapter {name!r} that can answer")


def context_line(context: int, asked: int) -> str:
    """Say how long a prompt and its answer may be, and why that is less than was ``asked`` for."""
    line = f"a prompt and its answer may have {context} tokens together"
    if context >= asked:
        return f"{line} (inference.context)"
    return f"{line}: the base model was trained on no more (inference.context = {asked})"


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
