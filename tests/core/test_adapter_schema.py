"""Adapter schemas: two sides agree on one only if everything about the adapter is equal."""

import dataclasses

import pytest
import torch

from fedpeft.adapters import AdapterSchema, AdapterState, TensorSpec, schema_of
from fedpeft.errors import AdapterError, SchemaMismatch

A = TensorSpec("m.q.lora_A.weight", (2, 6))
B = TensorSpec("m.q.lora_B.weight", (4, 2))
SCHEMA = AdapterSchema((A, B), "a" * 64)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("m.q.weight", (2, 6)),
        ("m.q.lora_B.bias", (2, 6)),
        ("m.q.lora_magnitude_vector.weight", (2, 6)),
        ("m.embed.lora_embedding_A", (2, 6)),
        ("m.q.lora_A.weight", (0, 6)),
        ("m.q.lora_A.weight", (2, 0)),
    ],
)
def test_what_is_no_lora_factor_is_refused(name: str, shape: tuple[int, int]):
    with pytest.raises(AdapterError, match="not a LoRA factor"):
        TensorSpec(name, shape)


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4), ()])
def test_a_tensor_that_is_no_matrix_is_refused(shape: tuple[int, ...]):
    with pytest.raises(AdapterError, match="not a LoRA factor"):
        schema_of({A.name: torch.zeros(shape)}, "a" * 64, "float32")


@pytest.mark.parametrize("tensors", [(), (B, A), (A, A)])
def test_no_unsorted_or_repeated_tensors(tensors: tuple[TensorSpec, ...]):
    with pytest.raises(AdapterError, match="distinct tensor names"):
        AdapterSchema(tensors, "a" * 64)


@pytest.mark.parametrize(
    "other",
    [
        AdapterSchema((A,), SCHEMA.fingerprint),
        AdapterSchema((TensorSpec("m.k.lora_A.weight", (2, 6)), B), SCHEMA.fingerprint),
        AdapterSchema((TensorSpec(A.name, (2, 7)), B), SCHEMA.fingerprint),
        AdapterSchema((TensorSpec(A.name, (6, 2)), B), SCHEMA.fingerprint),
        dataclasses.replace(SCHEMA, dtype="float16"),
        dataclasses.replace(SCHEMA, fingerprint="b" * 64),
    ],
    ids=["count", "name", "shape", "order of the shape", "dtype", "fingerprint"],
)
def test_every_difference_changes_the_hash(other: AdapterSchema):
    assert other.hash != SCHEMA.hash
    with pytest.raises(SchemaMismatch, match="from north"):
        SCHEMA.require(other.hash, source="north")


def test_equal_content_has_an_equal_hash():
    same = schema_of({B.name: torch.ones(4, 2), A.name: torch.ones(2, 6)}, "a" * 64, "float32")
    assert same == SCHEMA
    assert same.hash == SCHEMA.hash
    SCHEMA.require(same.hash, source="north")


def test_a_factor_knows_its_module_and_rank():
    assert [(spec.factor, spec.module, spec.rank) for spec in SCHEMA.tensors] == [
        ("A", "m.q", 2),
        ("B", "m.q", 2),
    ]
    assert SCHEMA.numel == 12 + 8


@pytest.mark.parametrize("values", [torch.zeros(19), torch.zeros(20, 1), torch.zeros(20).half()])
def test_values_that_do_not_fit_the_schema_are_refused(values: torch.Tensor):
    with pytest.raises(AdapterError, match="do not fit"):
        AdapterState(SCHEMA, values)
