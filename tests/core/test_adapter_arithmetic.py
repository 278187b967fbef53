"""Adding and subtracting adapters, their norm, and what is not finite."""

import math

import pytest
import torch

from fedpeft.adapters import AdapterSchema, AdapterState, TensorSpec
from fedpeft.errors import NotFinite, SchemaMismatch


def schema(
    rank: int = 2, inputs: int = 5, outputs: int = 3, fingerprint: str = "a"
) -> AdapterSchema:
    factors = (
        TensorSpec("m.lora_A.weight", (rank, inputs)),
        TensorSpec("m.lora_B.weight", (outputs, rank)),
    )
    return AdapterSchema(factors, fingerprint * 64)


def drawn(of: AdapterSchema, seed: int) -> AdapterState:
    values = torch.randn(of.numel, generator=torch.Generator().manual_seed(seed))
    return AdapterState(of, values)


@pytest.mark.parametrize("operation", ["plus", "minus"])
def test_adapters_of_two_schemas_do_not_mix(operation: str):
    with pytest.raises(SchemaMismatch):
        getattr(drawn(schema(), 0), operation)(drawn(schema(rank=4), 1))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_counted(bad: float):
    state = drawn(schema(), 0)
    state.values[3] = state.values[7] = bad
    with pytest.raises(NotFinite, match=r"from clinic north has 2 of 16 coordinates"):
        state.require_finite(source="clinic north")


def test_finite_values_pass():
    drawn(schema(), 0).require_finite(source="clinic north")


def test_a_change_leads_from_the_one_to_the_other():
    before, after = drawn(schema(), 0), drawn(schema(), 1)
    change = after.minus(before)
    torch.testing.assert_close(change.values, after.values - before.values)
    torch.testing.assert_close(before.plus(change).values, after.values)


def test_arithmetic_leaves_its_operands_alone():
    one, two = drawn(schema(), 0), drawn(schema(), 1)
    one.plus(two).values.zero_()
    one.minus(two).values.zero_()
    assert torch.equal(one.values, drawn(schema(), 0).values)
    assert torch.equal(two.values, drawn(schema(), 1).values)


def test_named_factors_and_the_flat_vector_are_the_same_values():
    state = drawn(schema(), 0)
    tensors = state.tensors()
    assert tensors["m.lora_A.weight"].shape == (2, 5)
    assert torch.equal(tensors["m.lora_B.weight"].reshape(-1), state.values[10:])
    again = AdapterState.from_tensors(dict(reversed(tensors.items())), state.schema)
    assert torch.equal(again.values, state.values)


def test_the_norm_is_euclidean():
    state = AdapterState(schema(), torch.full((16,), -2.0))
    assert state.norm() == pytest.approx(8.0)
