"""What a clinic is sent so that it holds an adapter: all of it, or only what it lacks.

A clinic keeps the last adapter that it was sent. Of the next one it then needs the
factors that changed, or, for a factor that was only multiplied by a small matrix for each
module, that matrix. What it puts together is checked against the adapter's SHA-256, so
both sides always speak of the same bits. Specified in docs/spec/parcel.md.

Knows nothing of encryption and messages.
"""

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final, Literal

import numpy as np
import torch
from pydantic import Field, ValidationError, model_validator

from fedpeft.adapters import (
    AdapterSchema,
    AdapterState,
    Factors,
    Mixing,
    TensorSpec,
    from_bytes,
    to_bytes,
)
from fedpeft.adapters.wire import HEADER_BYTES
from fedpeft.config import Settings
from fedpeft.errors import AdapterError, AdapterNotHeld, SealingError

MAGIC: Final = b"FPPARC\x00\x01"
"""The last byte is the version of the format."""
_LENGTH: Final = struct.Struct("<I")
_SOURCE: Final = "the server"


@dataclass(frozen=True)
class Increment:
    """A product BA of any rank that belongs to the base model, as the wire's ``update``."""

    rank: int
    data: bytes = field(repr=False)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the bytes, hex."""
        return hashlib.sha256(self.data).hexdigest()


@dataclass(frozen=True)
class Held:
    """What a clinic holds: an adapter, and the products that belong to the base model."""

    adapter: AdapterState
    increments: tuple[Increment, ...] = ()

    def to_bytes(self) -> bytes:
        """Return the adapter in its wire format."""
        return to_bytes(self.adapter, "adapter")

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the adapter's bytes and the increments' digests, hex."""
        whole = hashlib.sha256(self.to_bytes())
        for increment in self.increments:
            whole.update(bytes.fromhex(increment.digest))
        return whole.hexdigest()


class _Product(Settings):
    rank: int = Field(ge=1)
    length: int = Field(ge=1)


class _Header(Settings):
    """``basis`` is the digest of what this is a change of; empty for a whole."""

    basis: str
    fingerprint: str
    dtype: Literal["float32", "float16", "bfloat16"]
    tensors: tuple[tuple[str, int, int], ...]
    replaced: Factors | Literal[""]
    mixed: Literal["A", "B", ""]
    kept_products: int = Field(ge=0)
    products: tuple[_Product, ...]

    @model_validator(mode="after")
    def _a_whole_refers_to_nothing(self) -> "_Header":
        if not self.basis and (self.replaced, self.mixed, self.kept_products) != ("AB", "", 0):
            raise ValueError("a whole parcel must hold everything")
        return self


def whole(target: Held) -> bytes:
    """Return the parcel for a clinic of which nothing is known."""
    return b"".join(_whole(target))


def change(basis: Held, target: Held, mixing: Mixing | None) -> bytes | None:
    """Return the parcel for a clinic that holds ``basis``; None if a whole is no larger.

    ``mixing`` is a guess of how a factor changed: it is used if it gives ``target``'s bits
    and is shorter than the factor.
    """
    kept = len(basis.increments)
    if [one.digest for one in target.increments[:kept]] != [one.digest for one in basis.increments]:
        return None
    old, new = basis.adapter, target.adapter
    if old.schema != new.schema:
        return None
    replaced = "".join(factor for factor in ("A", "B") if not _same(old, new, factor))
    ways = [_whole(target), _parts(target, basis.digest, replaced, None, kept)]
    if mixing is not None and mixing.factor in replaced and _gives(mixing, old, new):
        rest = replaced.replace(mixing.factor, "")
        ways.append(_parts(target, basis.digest, rest, mixing, kept))
    shortest = min(ways, key=_bytes)
    return None if shortest is ways[0] else b"".join(shortest)


def _bytes(parts: Sequence[bytes]) -> int:
    return sum(len(part) for part in parts)


def _gives(mixing: Mixing, old: AdapterState, new: AdapterState) -> bool:
    return _same(mixing.applied(old), new, mixing.factor)


def _same(one: AdapterState, other: AdapterState, factor: Factors) -> bool:
    # Compared as bytes: 0.0 equals -0.0 and has another digest, NaN does not equal itself.
    values, others = one.part(factor).values, other.part(factor).values
    return values.view(torch.uint8).equal(others.view(torch.uint8))


def _whole(target: Held) -> list[bytes]:
    return _parts(target, "", "AB", None, 0)


def _parts(
    target: Held, basis: str, replaced: str, mixing: Mixing | None, kept: int
) -> list[bytes]:
    """Return a parcel's bytes one after the other; products are not copied."""
    schema, new = target.adapter.schema, target.increments[kept:]
    header = _Header(
        basis=basis,
        fingerprint=schema.fingerprint,
        dtype=schema.dtype,  # pyright: ignore[reportArgumentType]
        tensors=tuple((spec.name, *spec.shape) for spec in schema.tensors),
        replaced=replaced,  # pyright: ignore[reportArgumentType]
        mixed=mixing.factor if mixing else "",
        kept_products=kept,
        products=tuple(_Product(rank=one.rank, length=len(one.data)) for one in new),
    )
    text = header.model_dump_json().encode()
    parts = [MAGIC, _LENGTH.pack(len(text)), text]
    if replaced:
        parts.append(to_bytes(target.adapter.part(header.replaced or "AB"), "adapter"))
    if mixing is not None:
        parts.append(mixing.matrices.astype("<f8").tobytes())
    return [*parts, *(one.data for one in new)]


def opened(parcel: bytes, held: Held | None, digest: str) -> Held:
    """Return what the clinic holds now that ``parcel`` came; ``held`` is what it held before.

    An empty parcel stands for no change.

    Raises:
        AdapterNotHeld: the parcel is a change of something else, or the outcome is not
            what the server signed as ``digest``.
        SealingError: it is not in this form.
        SchemaMismatch: a part of it is not of the schema that it names, or that schema is
            not the one of ``held``.
    """
    found = _opened(parcel, held) if parcel else held
    if found is None or found.digest != digest:
        raise AdapterNotHeld(
            "the server sent only what changed in the adapter, and this clinic does not hold "
            "what it changed from; the server sends the whole adapter then"
        )
    return found


def _opened(parcel: bytes, held: Held | None) -> Held | None:
    header, at = _read_header(parcel)
    schema, reader = _schema_of(header), _Reader(parcel, at)
    if header.basis:
        if held is None or held.digest != header.basis:
            return None
        schema.require(held.adapter.schema.hash, source=_SOURCE)
        if header.kept_products > len(held.increments):
            raise _unreadable()
        adapter, kept = _changed(held.adapter, header, reader), held.increments
    else:
        adapter, kept = _replaced("AB", schema, reader), ()
    new = [_increment(one, schema, reader) for one in header.products]
    reader.end()
    return Held(adapter, (*kept[: header.kept_products], *new))


def _changed(adapter: AdapterState, header: _Header, reader: "_Reader") -> AdapterState:
    if header.replaced:
        adapter = adapter.with_part(_replaced(header.replaced, adapter.schema, reader))
    if header.mixed:
        mixing = _mixing(header.mixed, adapter.schema, reader)
        # Numbers that are too large make no adapter that was signed: the digest tells.
        with np.errstate(all="ignore"):
            adapter = mixing.applied(adapter)
    return adapter


def _read_header(parcel: bytes) -> tuple[_Header, int]:
    at = len(MAGIC) + _LENGTH.size
    try:
        if parcel[: len(MAGIC)] != MAGIC:
            raise ValueError
        (length,) = _LENGTH.unpack_from(parcel, len(MAGIC))
        return _Header.model_validate_json(parcel[at : at + length]), at + length
    except (ValueError, struct.error, ValidationError):
        raise _unreadable() from None


def _schema_of(header: _Header) -> AdapterSchema:
    try:
        specs = [TensorSpec(name, (rows, columns)) for name, rows, columns in header.tensors]
        schema = AdapterSchema(tuple(specs), header.fingerprint, header.dtype)
    except AdapterError:
        raise _unreadable() from None
    if schema.factors != "AB":
        raise _unreadable()
    return schema


def _replaced(factors: Factors, schema: AdapterSchema, reader: "_Reader") -> AdapterState:
    part = schema.part(factors)
    data = reader.take(HEADER_BYTES + part.numel * part.itemsize)
    return from_bytes(data, part, "adapter", source=_SOURCE)


def _increment(product: _Product, schema: AdapterSchema, reader: "_Reader") -> Increment:
    data = reader.take(product.length)
    # The digest is one of bytes alone; that they are of this rank is checked here.
    from_bytes(data, schema.of_rank(product.rank), "update", source=_SOURCE)
    return Increment(product.rank, data)


def _mixing(factor: Literal["A", "B"], schema: AdapterSchema, reader: "_Reader") -> Mixing:
    modules = sum(spec.factor == factor for spec in schema.tensors)
    shape = (modules, schema.rank, schema.rank)
    data = reader.take(8 * modules * schema.rank**2)
    return Mixing(factor, np.frombuffer(data, "<f8").reshape(shape))


class _Reader:
    """Takes one part of the bytes after the other."""

    def __init__(self, data: bytes, at: int) -> None:
        self._data = data
        self._at = at

    def take(self, count: int) -> bytes:
        end = self._at + count
        if end > len(self._data):
            raise _unreadable()
        part, self._at = self._data[self._at : end], end
        return part

    def end(self) -> None:
        if self._at != len(self._data):
            raise _unreadable()


def _unreadable() -> SealingError:
    return SealingError(
        "the adapter that came is not in the form of this release: it is not used; install the "
        "same fedpeft release on both sides"
    )
