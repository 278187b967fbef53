"""What may be said of a message in an audit log: its place, its size and its hash.

Nothing is opened for it. Both sides hash the same sealed bytes, so their logs can be
compared. Must not know the log.
"""

import hashlib

from flwr.app import Message

from fedpeft.audit_log import Value, word
from fedpeft.errors import SealingError
from fedpeft.protocol.carrier import carried
from fedpeft.sealing import Context, read_context


def claimed_context(message: Message) -> Context | None:
    """Return the place that a sealed message claims; None if it is not sealed."""
    try:
        sealed, _ = carried(message.content, source="a message")
        return read_context(sealed)
    except SealingError:
        return None


def message_facts(message: Message, context: Context | None) -> dict[str, Value]:
    """Return type, place, way of protection, size and hash of a message, as an entry has them.

    ``bytes`` counts what is sealed and what is broadcast with it; ``sha256`` is that of the
    sealed part, which fixes the other by its key. Of a reason word both are of the word.

    Args:
        message: that came or is about to leave.
        context: its place, or for a reason word that of the message that it answers.
    """
    facts = place_facts(message, context)
    if message.has_error():
        reason = message.error.reason or ""
        content = reason.encode()
        return {
            **facts,
            "mode": "plain",
            **_measured(content, len(content)),
            "reason": word(reason),
        }
    try:
        sealed, broadcast = carried(message.content, source="a message")
    except SealingError:
        return facts
    return {
        **facts,
        "mode": mode_of(message),
        **_measured(sealed, len(sealed) + len(broadcast or b"")),
    }


def place_facts(message: Message, context: Context | None) -> dict[str, Value]:
    """Return type and place of a message."""
    facts: dict[str, Value] = {
        "type": word(message.metadata.message_type),
        # In decimal: few readers of JSON have whole numbers of 64 bits.
        "run": str(message.metadata.run_id),
    }
    if context is not None:
        facts |= {"round": context.round, "attempt": context.attempt}
    return facts


def mode_of(message: Message) -> str:
    """Return ``secagg`` for a step of a secure sum, and else ``sealed``."""
    return "secagg" if "." in message.metadata.message_type else "sealed"


def _measured(content: bytes, size: int) -> dict[str, Value]:
    return {"bytes": size, "sha256": hashlib.sha256(content).hexdigest()}
