"""Parts of an adapter: one factor, or the first rows of A and columns of B."""

from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.adapters import AdapterSchema, AdapterState, Factors, TensorSpec
from fedpeft.errors import AdapterError, SchemaMismatch

FACTORS: list[Factors] = ["A", "B", "AB"]


def schema(rank: int = 3, fingerprint: str = "a") -> AdapterSchema:
    tensors = (
        TensorSpec("m.lora_A.weight", (rank, 5)),
        TensorSpec("m.lora_B.weight", (4, rank)),
        TensorSpec("n.lora_A.weight", (rank, 2)),
        TensorSpec("n.lora_B.weight", (7, rank)),
    )
    return AdapterSchema(tensors, fingerprint * 64)


def drawn(of: AdapterSchema, seed: int) -> AdapterState:
    values = torch.randn(of.numel, generator=torch.Generator().manual_seed(seed))
    return AdapterState(of, values)


@pytest.mark.parametrize("rank", [-1, 0, 4])
def test_a_part_of_a_rank_that_is_not_there_is_refused(rank: int):
    with pytest.raises(AdapterError, match=f"rank {rank}"):
        drawn(schema(), 0).part("AB", rank)


def test_a_part_of_a_factor_that_is_not_there_is_refused():
    with pytest.raises(AdapterError, match="factors A"):
        drawn(schema(), 0).part("B").part("A")


def test_the_part_of_another_base_model_is_refused():
    with pytest.raises(SchemaMismatch):
        drawn(schema(), 0).with_part(drawn(schema(fingerprint="b"), 1).part("B"))


def test_a_part_of_a_higher_rank_is_refused():
    with pytest.raises(SchemaMismatch):
        drawn(schema(rank=2), 0).with_part(drawn(schema(rank=3), 1).part("B"))


@given(factors=st.sampled_from(FACTORS), rank=st.integers(1, 3))
def test_a_part_is_the_first_rows_of_a_and_columns_of_b(factors: Factors, rank: int):
    state = drawn(schema(), 0)
    tensors = state.tensors()
    part = state.part(factors, rank).tensors()
    assert list(part) == [name for name in tensors if name.split("lora_")[1][0] in factors]
    for name, tensor in part.items():
        expected = tensors[name][:rank] if "lora_A" in name else tensors[name][:, :rank]
        assert torch.equal(tensor, expected)


@given(factors=st.sampled_from(FACTORS), rank=st.integers(1, 3))
def test_putting_a_part_back_changes_nothing(factors: Factors, rank: int):
    state = drawn(schema(), 0)
    assert torch.equal(state.with_part(state.part(factors, rank)).values, state.values)


@given(factors=st.sampled_from(FACTORS), rank=st.integers(1, 3))
def test_a_part_replaces_its_own_coordinates_and_no_others(factors: Factors, rank: int):
    state, other = drawn(schema(), 0), drawn(schema(), 1)
    found = state.with_part(other.part(factors, rank))
    assert torch.equal(found.part(factors, rank).values, other.part(factors, rank).values)
    replaced = int((found.values != state.values).sum())
    assert replaced == other.schema.part(factors, rank).numel


@pytest.mark.parametrize("factors", FACTORS)
def test_a_part_is_a_copy(factors: Factors):
    state = drawn(schema(), 0)
    before = state.values.clone()
    state.part(factors).values.zero_()
    state.with_part(state.part(factors)).values.zero_()
    assert torch.equal(state.values, before)


def test_a_schema_says_which_factors_it_has():
    assert [schema().part(factors).factors for factors in FACTORS] == FACTORS


def test_the_whole_is_the_same_schema():
    assert schema().part("AB").hash == schema().hash


@pytest.mark.parametrize("factor", ["A", "B"])
def test_of_another_rank_only_the_rank_differs(factor: Literal["A", "B"]):
    wider = schema().of_rank(6)
    assert wider.rank == 6
    assert wider.part(factor, 3).hash == schema().part(factor).hash
