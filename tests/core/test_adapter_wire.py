"""The wire format: what is not exactly as agreed is refused, whatever byte differs."""

import gc
import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fedpeft.adapters import (
    AdapterSchema,
    AdapterState,
    TensorSpec,
    WeightedMean,
    from_bytes,
    to_bytes,
)
from fedpeft.adapters.state import DTYPES
from fedpeft.adapters.wire import HEADER_BYTES
from fedpeft.errors import SchemaMismatch


def schema(dtype: str = "float32", fingerprint: str = "a", outputs: int = 3) -> AdapterSchema:
    factors = TensorSpec("m.lora_A.weight", (2, 4)), TensorSpec("m.lora_B.weight", (outputs, 2))
    return AdapterSchema(factors, fingerprint * 64, dtype)


STATE = AdapterState(schema(), torch.arange(14, dtype=torch.float32))
BYTES = to_bytes(STATE, "adapter")


def refused(data: bytes, agreed: AdapterSchema | None = None) -> None:
    with pytest.raises(SchemaMismatch, match="from north"):
        from_bytes(data, agreed or schema(), "adapter", source="north")


@given(position=st.integers(0, HEADER_BYTES - 1), value=st.integers(1, 255))
def test_any_changed_byte_of_the_header_is_refused(position: int, value: int):
    data = bytearray(BYTES)
    data[position] ^= value
    refused(bytes(data))


def test_every_byte_of_the_header_is_checked():
    for position in range(HEADER_BYTES):
        for bit in range(8):
            data = bytearray(BYTES)
            data[position] ^= 1 << bit
            refused(bytes(data))


@pytest.mark.parametrize("length", range(len(BYTES)))
def test_a_truncated_adapter_is_refused(length: int):
    refused(BYTES[:length])


@pytest.mark.parametrize("surplus", [1, 4, HEADER_BYTES, len(BYTES)])
def test_an_extended_adapter_is_refused(surplus: int):
    refused(BYTES + bytes(surplus))


@pytest.mark.parametrize(
    "agreed", [schema("float16"), schema(fingerprint="b"), schema(outputs=2), schema(outputs=4)]
)
def test_an_adapter_of_another_schema_is_refused(agreed: AdapterSchema):
    refused(BYTES, agreed)


def test_an_update_is_not_taken_for_an_adapter():
    refused(to_bytes(STATE, "update"))


def test_another_format_version_is_named():
    data = bytearray(BYTES)
    struct.pack_into("<H", data, 8, 2)
    with pytest.raises(SchemaMismatch, match="version is 2, this release reads 1"):
        from_bytes(bytes(data), schema(), "adapter", source="north")


def test_the_layout_is_the_specified_one():
    header = b"FPADAPT\x00" + struct.pack("<HH", 1, 1) + bytes.fromhex(schema().hash)
    header += struct.pack("<Q", 14)
    assert header + np.arange(14, dtype="<f4").tobytes() == BYTES
    assert to_bytes(STATE, "update")[8:12] == struct.pack("<HH", 1, 2)


@given(raw=st.binary(min_size=28, max_size=28), kind=st.sampled_from(["adapter", "update"]))
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_what_is_read_is_what_was_written_to_the_bit(dtype: str, raw: bytes, kind: str):
    values = torch.frombuffer(bytearray(raw), dtype=DTYPES[dtype])
    sent = AdapterState(schema(dtype), values)
    got = from_bytes(to_bytes(sent, kind), schema(dtype), kind, source="north")  # pyright: ignore[reportArgumentType]
    assert torch.equal(got.values.view(torch.int16), values.view(torch.int16))


@given(values=arrays.arrays(np.float32, 14, elements=st.floats(width=32)))
def test_single_precision_survives_the_wire_to_the_bit(values: np.ndarray):
    sent = AdapterState(schema(), torch.from_numpy(values))
    got = from_bytes(to_bytes(sent, "update"), schema(), "update", source="north")
    assert got.values.numpy().tobytes() == values.tobytes()


def test_what_is_read_needs_no_second_copy_of_the_message():
    got = from_bytes(BYTES, schema(), "adapter", source="north")
    message = np.frombuffer(BYTES, dtype=np.uint8)
    assert got.values.data_ptr() == message.ctypes.data + HEADER_BYTES


def test_what_is_read_outlives_the_name_of_the_message():
    got = from_bytes(bytes(bytearray(BYTES)), schema(), "adapter", source="north")
    gc.collect()
    assert torch.equal(got.values, STATE.values)


def test_arithmetic_leaves_the_message_as_it_came():
    data = bytes(bytearray(BYTES))
    got = from_bytes(data, schema(), "adapter", source="north")
    mean = WeightedMean(schema())
    mean.add(got, 3.0)
    mean.result().values.zero_()
    got.plus(got).values.zero_()
    got.part("A").values.zero_()
    got.with_part(got.part("B", 1)).values.zero_()
    assert data == BYTES
