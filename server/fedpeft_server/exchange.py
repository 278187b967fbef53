"""Send one message to every clinic, wait, and sort the answers from the failures.

A clinic that dies, hangs, or answers with something that cannot be used is
named with the reason; the others' answers are used.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from flwr.app import Message

from fedpeft.errors import FedpeftError
from fedpeft_server.link import Link

TIMEOUT, OFFLINE, UNEXPLAINED = "timeout", "offline", "internal-error"
_CLIENT_APP_ERROR, _POLICY_ERROR, _NODE_UNAVAILABLE = 2, 7, 5
_REASON = re.compile(r"[a-z]+(-[a-z]+){0,5}")
Check = Callable[[str, Message], None]
"""Raises a FedpeftError if the answer of the named clinic cannot be used."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Usable answers by clinic name, in order of name, and the reasons of the others."""

    answers: dict[str, Message]
    failed: dict[str, str]


def exchange(link: Link, messages: Iterable[Message], *, timeout_s: float, check: Check) -> Outcome:
    """Send ``messages`` and wait at most ``timeout_s`` seconds for the replies."""
    names = link.names()
    outgoing = list(messages)
    asked = {message.metadata.dst_node_id for message in outgoing}
    failed: dict[str, str] = {names[node]: TIMEOUT for node in asked}
    answers: dict[str, Message] = {}
    for reply in link.grid.send_and_receive(outgoing, timeout=timeout_s):
        node = link.node_of(reply)
        if node not in asked or names[node] in answers:
            continue
        name = names[node]
        if reply.has_error():
            failed[name] = _reason_of(reply)
            continue
        try:
            check(name, reply)
        except FedpeftError as error:
            failed[name] = error.reason
        else:
            del failed[name]
            answers[name] = reply
    return Outcome(dict(sorted(answers.items())), dict(sorted(failed.items())))


def _reason_of(reply: Message) -> str:
    """Return the reason that a clinic gave, or ours for what Flower reports.

    A clinic's text is not trusted: anything but a short word with hyphens is dropped.
    """
    code, reason = reply.error.code, reply.error.reason or ""
    if code == _NODE_UNAVAILABLE:
        return OFFLINE
    if code in (_CLIENT_APP_ERROR, _POLICY_ERROR) and _REASON.fullmatch(reason):
        return reason
    return UNEXPLAINED
