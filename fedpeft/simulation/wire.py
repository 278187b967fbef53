"""Flower's own serialisation of a message, for engines without a network."""

from typing import cast

from flwr.app import Message
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents


def wire_bytes(message: Message) -> int:
    """Return the bytes that ``message`` has on Flower's wire, without HTTP and TLS."""
    return sum(len(part) for part in _serialised(message).values())


def through_the_wire(message: Message) -> tuple[Message, int]:
    """Serialise ``message``, read it back, and also return how many bytes it had."""
    contents = _serialised(message)
    size = sum(len(part) for part in contents.values())  # reading back empties it
    arrived = cast("Message", inflate_object_from_contents(message.object_id, contents))
    arrived.metadata.__dict__["_message_id"] = message.metadata.message_id
    return arrived, size


def _serialised(message: Message) -> dict[str, bytes]:
    return {key: part.deflate() for key, part in get_all_nested_objects(message).items()}
