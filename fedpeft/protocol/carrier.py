"""Sealed bytes as Flower records: all that Flower's wire and database ever hold of a message.

One array for what is sealed to the reader, one for what is encrypted for everyone:
Flower stores equal arrays once, so a broadcast to a hundred clinics lies there once.
"""

from typing import Final

from flwr.app import Array, ArrayRecord, RecordDict

from fedpeft.errors import SealingError

_RECORD: Final = "sealed"
_MESSAGE, _BROADCAST = "message", "broadcast"
_TYPE: Final = "fedpeft.sealed.v1"


def carry(message: bytes, broadcast: Array | None = None) -> RecordDict:
    """Pack sealed bytes, and a broadcast (see :func:`raw`) if there is one.

    Give the same object to every message: Flower hashes each object anew.
    """
    arrays = {_MESSAGE: raw(message)}
    if broadcast is not None:
        arrays[_BROADCAST] = broadcast
    return RecordDict({_RECORD: ArrayRecord(arrays)})


def carried(content: RecordDict, *, source: str) -> tuple[bytes, bytes | None]:
    """Return what :func:`carry` packed.

    Raises:
        SealingError: the message is not sealed; nothing of it is looked at.
    """
    record = content.get(_RECORD)
    arrays = dict(record) if isinstance(record, ArrayRecord) else {}
    expected = arrays.keys() in ({_MESSAGE}, {_MESSAGE, _BROADCAST}) and len(content) == 1
    if not expected or any(array.stype != _TYPE for array in arrays.values()):
        raise SealingError(
            f"a message from {source} is not sealed: it is not used; install the same fedpeft "
            "release on both sides"
        )
    broadcast = arrays.get(_BROADCAST)
    return arrays[_MESSAGE].data, None if broadcast is None else broadcast.data


def raw(data: bytes) -> Array:
    """Return bytes as one of Flower's arrays."""
    return Array("bytes", (len(data),), _TYPE, data)
