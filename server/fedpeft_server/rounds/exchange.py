"""Send one message to every clinic, wait, and sort the answers from the failures.

A clinic that dies, hangs, or answers with something that cannot be used is
named with the reason; the others' answers are used.
"""

import re
from collections.abc import Callable, Iterable

from flwr.app import Message

from fedpeft.errors import FedpeftError
from fedpeft_server.link.link import Link

TIMEOUT, OFFLINE, UNEXPLAINED = "timeout", "offline", "internal-error"
_CLIENT_APP_ERROR, _POLICY_ERROR, _NODE_UNAVAILABLE = 2, 7, 5
_REASON = re.compile(r"[a-z]+(-[a-z]+){0,5}")
Take = Callable[[str, Message], None]
"""Takes the answer of the named clinic; raises a FedpeftError if it cannot be used."""


def exchange(
    link: Link, messages: Iterable[Message], asked: Iterable[int], *, timeout_s: float, take: Take
) -> dict[str, str]:
    """Send ``messages`` to the nodes ``asked``, at most one each, and wait for the replies.

    Each reply is taken as it arrives and kept nowhere.

    Returns:
        The reasons of the clinics whose answer was not taken, by name.
    """
    names = link.names()
    waiting = set(asked)
    failed: dict[str, str] = {names[node]: TIMEOUT for node in waiting}
    for reply in link.grid.send_and_receive(messages, timeout=timeout_s):
        node = link.node_of(reply)
        if node not in waiting:
            continue
        waiting.discard(node)
        name = names[node]
        if reply.has_error():
            failed[name] = _reason_of(reply)
            continue
        try:
            take(name, reply)
        except FedpeftError as error:
            failed[name] = error.reason
        else:
            del failed[name]
    return dict(sorted(failed.items()))


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
