"""One adapter as one run of bytes: header, then the flat vector.

The format is specified in docs/spec/adapter-wire.md. Reading checks everything
before a value is touched; nothing in the bytes can make the reader run code.
"""

import struct
from typing import Literal

import numpy as np
import torch

from fedpeft.adapters.schema import AdapterSchema
from fedpeft.adapters.state import DTYPES, AdapterState
from fedpeft.errors import SchemaMismatch

MAGIC = b"FPADAPT\x00"
VERSION = 1
Kind = Literal["adapter", "update"]
_KINDS: dict[Kind, int] = {"adapter": 1, "update": 2}
_HEADER = struct.Struct("<8sHH32sQ")
HEADER_BYTES = _HEADER.size


def to_bytes(state: AdapterState, kind: Kind) -> bytes:
    """Return header and little-endian values, ``HEADER_BYTES + numel * itemsize`` bytes."""
    header = _HEADER.pack(
        MAGIC, VERSION, _KINDS[kind], bytes.fromhex(state.schema.hash), state.schema.numel
    )
    raw = state.values.contiguous().view(torch.uint8).numpy()
    return header + raw.tobytes()


def from_bytes(data: bytes, schema: AdapterSchema, kind: Kind, *, source: str) -> AdapterState:
    """Read what :func:`to_bytes` wrote; ``schema`` is the one that was agreed.

    The values lie in ``data`` itself, which stays in memory as long as they do: a copy
    would be the largest part of what a server holds beside its sum. They are not to be
    written to.

    Raises:
        SchemaMismatch: magic, version, kind, schema hash, count or length is not as agreed.
    """
    if len(data) < HEADER_BYTES:
        raise _refused(source, f"it has {len(data)} bytes, fewer than a header")
    magic, version, code, digest, numel = _HEADER.unpack_from(data)
    if magic != MAGIC:
        raise _refused(source, "it does not begin with the mark of an adapter")
    if version != VERSION:
        raise _refused(source, f"its format version is {version}, this release reads {VERSION}")
    if code != _KINDS[kind]:
        raise _refused(source, f"it is not of the kind {kind!r}")
    schema.require(digest.hex(), source=source)
    dtype = DTYPES[schema.dtype]
    expected = HEADER_BYTES + schema.numel * dtype.itemsize
    if numel != schema.numel or len(data) != expected:
        raise _refused(source, f"it has {len(data)} bytes where {expected} were agreed")
    # Not torch.frombuffer: it warns of bytes that cannot be written, once in a process.
    raw = torch.from_dlpack(np.frombuffer(data, dtype=np.uint8, offset=HEADER_BYTES))
    return AdapterState(schema, raw.view(dtype))


def _refused(source: str, why: str) -> SchemaMismatch:
    return SchemaMismatch(
        f"the adapter from {source} is refused: {why}; "
        "install the same fedpeft release on both sides"
    )
