"""What a GGUF file says of itself, read with suspicion: every length is checked against the file.

Loads no weights. llama.cpp maps the file and trusts it, and a file that was cut short ends
the process at the first page that is not there; so it is checked here first.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, cast

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

from fedpeft.errors import ModelError
from fedpeft.gguf_format.layout import (
    ALIGNMENT,
    MAGIC,
    STRUCTS,
    Scalar,
    ValueType,
    aligned,
    tensor_bytes,
)

FINGERPRINT = "fedpeft.base.fingerprint"
"""Key of the fingerprint of the base model that a file was made of, or an adapter trained on."""
QUANTISATION = "fedpeft.quantisation"
LINEAGE = "fedpeft.lineage"
_VERSIONS = (2, 3)
_MOST_ENTRIES = 1 << 20
_MOST_AXES = 4
_LONGEST_KEY = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Place:
    """A tensor in the file: ``shape`` outermost first, ``begin`` and ``nbytes`` in bytes."""

    shape: tuple[int, ...]
    encoding: GGMLQuantizationType
    begin: int
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class Header:
    """What the beginning of a GGUF file says.

    ``quantisation`` is of :data:`fedpeft.gguf_format.Quantisation` where fedpeft or llama.cpp
    wrote one of these, another name of llama.cpp (lower case) or None otherwise.
    ``fingerprint`` is that of the base model's directory, None in files that others made.
    ``metadata`` has all single values; ``tensors`` says where each tensor lies, by name.
    """

    architecture: str
    quantisation: str | None
    fingerprint: str | None
    context_length: int | None
    is_adapter: bool
    metadata: Mapping[str, Scalar] = field(repr=False)
    tensors: Mapping[str, Place] = field(repr=False)


def read_header(path: Path) -> Header:
    """Read the header and check that every tensor which it names lies within the file.

    Raises:
        ModelError: there is no such file, it is no GGUF, it is cut short or damaged, or only
            one part of a model.
    """
    try:
        with path.open("rb") as file:
            return _header(_Reader(file, path.stat().st_size))
    except OSError as error:
        raise ModelError(
            f"{path} cannot be read: {(error.strerror or '').lower()}; name a GGUF file"
        ) from None
    except (_Damaged, UnicodeDecodeError) as error:
        why = str(error) if isinstance(error, _Damaged) else "a name in it is no text"
        raise ModelError(f"{path} is no usable GGUF file: {why}; copy the file again") from None


class _Damaged(Exception):
    """What is wrong with the file."""


class _Reader:
    """Reads values one after the other and never beyond the file's end."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self.size = size

    @property
    def place(self) -> int:
        return self._file.tell()

    def _require(self, count: int) -> None:
        if count > self.size - self.place:
            raise _Damaged(f"it ends after {self.size} bytes, in the midst of its header")

    def take(self, count: int) -> bytes:
        self._require(count)
        return self._file.read(count)

    def skip(self, count: int) -> None:
        self._require(count)
        self._file.seek(count, 1)

    def unpack(self, kind: ValueType) -> Scalar:
        packed = STRUCTS[kind]
        return cast("Scalar", packed.unpack(self.take(packed.size))[0])

    def count(self, kind: ValueType, limit: int, what: str) -> int:
        """Return a whole number, of which more than ``limit`` is a sign of damage."""
        value = cast("int", self.unpack(kind))
        if value > limit:
            raise _Damaged(f"it names {value} {what}")
        return value

    def text(self, limit: int | None = None) -> str:
        return self.take(self.count(ValueType.UINT64, limit or self.size, "bytes of text")).decode()

    def kind(self) -> ValueType:
        number = cast("int", self.unpack(ValueType.UINT32))
        try:
            return ValueType(number)
        except ValueError:
            raise _Damaged(f"it has metadata of the unknown type {number}") from None

    def _skip_texts(self, count: int) -> None:
        # A vocabulary has 100,000 of them, so this is said in as few steps as there are.
        read, seek, length = self._file.read, self._file.seek, STRUCTS[ValueType.UINT64]
        for _ in range(count):
            data = read(length.size)
            size = length.unpack(data)[0] if len(data) == length.size else self.size
            if size >= self.size:
                raise _Damaged(f"it ends after {self.size} bytes, in the midst of its vocabulary")
            seek(size, 1)
        self._require(0)

    def skip_array(self) -> None:
        kind = self.kind()
        count = self.count(ValueType.UINT64, self.size, "values in a list")
        if kind is ValueType.ARRAY:
            raise _Damaged("it has a list of lists in its metadata")
        if kind is ValueType.STRING:
            self._skip_texts(count)
        else:
            self.skip(count * STRUCTS[kind].size)


def _header(reader: _Reader) -> Header:
    if reader.size < len(MAGIC) or reader.take(len(MAGIC)) != MAGIC:
        raise _Damaged("it does not begin as one")
    version = cast("int", reader.unpack(ValueType.UINT32))
    if version not in _VERSIONS:
        raise _Damaged(f"it is of version {version}, not 2 or 3")
    tensors = reader.count(ValueType.UINT64, _MOST_ENTRIES, "tensors")
    entries = reader.count(ValueType.UINT64, _MOST_ENTRIES, "metadata entries")
    metadata = _metadata(reader, entries)
    places = dict(_place(reader) for _ in range(tensors))
    return _described(metadata, _within(reader, places, metadata))


def _metadata(reader: _Reader, entries: int) -> dict[str, Scalar]:
    metadata: dict[str, Scalar] = {}
    for _ in range(entries):
        key = reader.text(_LONGEST_KEY)
        kind = reader.kind()
        if kind is ValueType.ARRAY:
            reader.skip_array()
        else:
            metadata[key] = reader.text() if kind is ValueType.STRING else reader.unpack(kind)
    return metadata


def _place(reader: _Reader) -> tuple[str, Place]:
    """Read the name of a tensor, and its place counted from where the data begin."""
    name = reader.text(_LONGEST_KEY)
    axes = reader.count(ValueType.UINT32, _MOST_AXES, f"axes of {name}")
    shape = tuple(cast("int", reader.unpack(ValueType.UINT64)) for _ in range(axes))[::-1]
    number = cast("int", reader.unpack(ValueType.UINT32))
    offset = cast("int", reader.unpack(ValueType.UINT64))
    if number not in set(GGML_QUANT_SIZES):
        raise _Damaged(f"the tensor {name} has the unknown encoding {number}")
    encoding = GGMLQuantizationType(number)
    nbytes = tensor_bytes(shape, encoding) if shape and math.prod(shape) else -1
    if nbytes < 0:
        raise _Damaged(f"the tensor {name} has an impossible shape")
    return name, Place(shape=shape, encoding=encoding, begin=offset, nbytes=nbytes)


def _within(
    reader: _Reader, places: Mapping[str, Place], metadata: Mapping[str, Scalar]
) -> dict[str, Place]:
    """Return the places counted from the file's beginning, all of them in the file."""
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise _Damaged(f"its alignment is {alignment}")
    first = aligned(reader.place, alignment)
    found: dict[str, Place] = {}
    for name, place in places.items():
        end = first + place.begin + place.nbytes
        if place.begin % alignment or end > reader.size:
            raise _Damaged(f"it has {reader.size} bytes, and its tensor {name} would end at {end}")
        found[name] = replace(place, begin=first + place.begin)
    return found


def _described(metadata: Mapping[str, Scalar], tensors: Mapping[str, Place]) -> Header:
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise _Damaged("it does not name its architecture")
    parts = metadata.get("split.count", 1)
    if parts != 1:
        raise _Damaged(f"it is one of {parts} parts of a model (join them with llama-gguf-split)")
    fingerprint = metadata.get(FINGERPRINT)
    context = metadata.get(f"{architecture}.context_length")
    return Header(
        architecture=architecture,
        quantisation=_quantisation(metadata),
        fingerprint=fingerprint if isinstance(fingerprint, str) else None,
        context_length=context if isinstance(context, int) else None,
        is_adapter=metadata.get("general.type") == "adapter",
        metadata=metadata,
        tensors=tensors,
    )


def _quantisation(metadata: Mapping[str, Scalar]) -> str | None:
    own, number = metadata.get(QUANTISATION), metadata.get("general.file_type")
    if isinstance(own, str):
        return own
    try:
        name = LlamaFileType(cast("int", number)).name
    except ValueError:
        return None
    return name.removeprefix("MOSTLY_").removeprefix("ALL_").lower()
