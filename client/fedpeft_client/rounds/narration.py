"""What the running client tells the person who watches it, one line at a time."""

from collections.abc import Callable

from fedpeft.training import Observer, StepDone
from fedpeft_client.link.connection import Event

_LINES = 10
"""At most so many progress lines in a round."""


def narrate_steps(say: Callable[[str], None]) -> Observer:
    """Return an observer that says now and then how training goes."""

    def observe(step: StepDone) -> None:
        every = max(1, step.steps // _LINES)
        if step.step % every == 0 or step.step == step.steps:
            say(
                f"round {step.place.round}/{step.place.rounds}: step {step.step}/{step.steps}, "
                f"loss {step.loss:.3f}, {step.tokens_per_s:,.0f} tokens/s"
            )

    return observe


def narrate_events(say: Callable[[str], None]) -> Callable[[Event], None]:
    """Return a listener that says what happens on the link to the server."""

    def listen(event: Event) -> None:
        detail = f": {event.detail}" if event.detail else ""
        sentence = {
            "waiting": f"waiting{detail}",
            "connected": "connected to the server, waiting for a round (Ctrl-C stops)",
            "disconnected": f"no connection{detail}; trying again",
            "received": f"received the {event.message_type} message of {event.bytes_in:,} bytes",
            "answered": (
                f"answered the {event.message_type} message with {event.bytes_out:,} bytes "
                f"after {event.seconds:.1f} s"
            ),
            "failed": f"could not do the {event.message_type} message{detail}",
            "refused": f"refused the {event.message_type} message{detail}",
            "dropped": f"dropped a message{detail}",
            "stopped": "stopped; what was finished is kept",
        }[event.kind]
        say(sentence)

    return listen
