"""The bytes of a GGUF file of version 3: metadata, the list of tensors, and their data.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Knows nothing of models: it writes
what it is given, tensor by tensor, so that no more than a part of one is in memory. The same
content gives the same bytes.
"""

import contextlib
import os
import struct
import tempfile
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from io import FileIO
from pathlib import Path
from typing import TypeAlias

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from fedpeft.storage import explained, sync_directory

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = 32
"""Bytes to a multiple of which the data of each tensor begins."""
Scalar: TypeAlias = str | bool | int | float
Value: TypeAlias = Scalar | Sequence[str] | Sequence[int] | Sequence[float]
Metadata: TypeAlias = Mapping[str, Value]
Observe: TypeAlias = Callable[[int, int], None]
"""Told how many bytes of tensors are written, and how many there will be."""


class ValueType(IntEnum):
    """The types of metadata."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


STRUCTS: Mapping[ValueType, struct.Struct] = {
    ValueType.UINT8: struct.Struct("<B"),
    ValueType.INT8: struct.Struct("<b"),
    ValueType.UINT16: struct.Struct("<H"),
    ValueType.INT16: struct.Struct("<h"),
    ValueType.UINT32: struct.Struct("<I"),
    ValueType.INT32: struct.Struct("<i"),
    ValueType.FLOAT32: struct.Struct("<f"),
    ValueType.BOOL: struct.Struct("<?"),
    ValueType.UINT64: struct.Struct("<Q"),
    ValueType.INT64: struct.Struct("<q"),
    ValueType.FLOAT64: struct.Struct("<d"),
}
"""How each type of fixed size is written; strings and arrays have a length before them."""


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """One tensor to write: ``blocks`` yields its bytes in row-major order when called.

    ``shape`` is that of the values, outermost first; rows lie along the last axis.
    """

    name: str
    shape: tuple[int, ...]
    encoding: GGMLQuantizationType
    blocks: Callable[[], Iterable[bytes]]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return tensor_bytes(self.shape, self.encoding)


def tensor_bytes(shape: Sequence[int], encoding: GGMLQuantizationType) -> int:
    """Return how many bytes a tensor takes, or -1 where rows are no whole number of blocks."""
    values, size = GGML_QUANT_SIZES[encoding]
    count = 1
    for width in shape:
        count *= width
    return -1 if shape[-1] % values else count // values * size


def aligned(size: int, alignment: int = ALIGNMENT) -> int:
    """Return the next multiple of ``alignment``."""
    return -(-size // alignment) * alignment


def write_gguf(
    path: Path, metadata: Metadata, tensors: Sequence[Tensor], observe: Observe | None = None
) -> None:
    """Write a whole new file and put it at ``path``, or leave what was there.

    Raises:
        StorageError: the disk is full, read-only, or the folder may not be written.
    """
    with explained("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _staged(path) as (file, staged):
            file.write(_head(metadata, tensors))
            _write_data(file, tensors, observe)
            os.fsync(file.fileno())
            staged.replace(path)
        sync_directory(path.parent)


@contextlib.contextmanager
def _staged(path: Path) -> Generator[tuple["_Whole", Path]]:
    """Yield a new file beside ``path``, which is removed unless it was renamed."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    staged = Path(name)
    try:
        # Without a buffer there is nothing left to write, and to fail, after an error.
        with open(descriptor, "wb", buffering=0) as file:  # noqa: PTH123  (a descriptor)
            os.fchmod(file.fileno(), 0o644)
            yield _Whole(file), staged
    finally:
        staged.unlink(missing_ok=True)


class _Whole:
    """An unbuffered file whose ``write`` writes everything, or raises."""

    def __init__(self, file: FileIO) -> None:
        self._file = file
        self.fileno = file.fileno

    def write(self, data: bytes) -> None:
        rest = memoryview(data)
        while len(rest):
            rest = rest[self._file.write(rest) :]


def _head(metadata: Metadata, tensors: Sequence[Tensor]) -> bytes:
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        kind, data = _encoded(value)
        parts += [_text(key), struct.pack("<I", kind), data]
    offset = 0
    for tensor in tensors:
        widths = reversed(tensor.shape)  # GGUF counts the fastest axis first
        parts.append(_text(tensor.name) + struct.pack("<I", len(tensor.shape)))
        parts += [struct.pack("<Q", width) for width in widths]
        parts.append(struct.pack("<IQ", tensor.encoding, offset))
        offset += aligned(tensor.nbytes)
    head = b"".join(parts)
    return head.ljust(aligned(len(head)), b"\0")


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _encoded(value: Value) -> tuple[ValueType, bytes]:
    if isinstance(value, str):
        return ValueType.STRING, _text(value)
    if isinstance(value, bool | int | float):
        kind = _kind(value)
        return kind, STRUCTS[kind].pack(value)
    kind = ValueType.STRING if isinstance(value[0], str) else _kind(value[0], signed=True)
    if kind is ValueType.STRING:
        data = b"".join(_text(str(each)) for each in value)
    else:
        data = b"".join(STRUCTS[kind].pack(each) for each in value)
    return ValueType.ARRAY, struct.pack("<IQ", kind, len(value)) + data


def _kind(value: float, *, signed: bool = False) -> ValueType:
    if isinstance(value, bool):
        return ValueType.BOOL
    if isinstance(value, float):
        return ValueType.FLOAT32
    return ValueType.INT32 if signed else ValueType.UINT32


def _write_data(file: _Whole, tensors: Sequence[Tensor], observe: Observe | None) -> None:
    total = sum(tensor.nbytes for tensor in tensors)
    done = 0
    for tensor in tensors:
        begun = done
        for block in tensor.blocks():
            file.write(block)
            done += len(block)
            if observe is not None:
                observe(done, total)
        if done - begun != tensor.nbytes:
            raise AssertionError(f"{tensor.name} gave {done - begun} bytes of {tensor.nbytes}")
        file.write(bytes(aligned(tensor.nbytes) - tensor.nbytes))
