"""The orthonormal gauge: the same product, from factors that another machine can follow."""

from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.adapters import AdapterSchema, AdapterState, Mixing, TensorSpec, orthonormal
from fedpeft.errors import AdapterError

Factor = Literal["A", "B"]
WIDTHS = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=3)
FACTOR = st.sampled_from(["A", "B"])


def drawn(widths: list[tuple[int, int]], rank: int, seed: int) -> AdapterState:
    tensors: list[TensorSpec] = []
    for index, (outputs, inputs) in enumerate(widths):
        tensors.append(TensorSpec(f"m{index}.lora_A.weight", (rank, inputs)))
        tensors.append(TensorSpec(f"m{index}.lora_B.weight", (outputs, rank)))
    schema = AdapterSchema(tuple(tensors), "a" * 64)
    values = torch.randn(schema.numel, generator=torch.Generator().manual_seed(seed))
    return AdapterState(schema, values)


def products(state: AdapterState) -> list[np.ndarray]:
    tensors = [tensor.double().numpy() for tensor in state.tensors().values()]
    return [b @ a for a, b in zip(tensors[::2], tensors[1::2], strict=True)]


def columns(state: AdapterState, factor: Factor) -> list[np.ndarray]:
    """A factor as matrices whose columns are to be orthonormal."""
    tensors = state.part(factor).tensors().values()
    return [(t.T if factor == "A" else t).double().numpy() for t in tensors]


@pytest.mark.parametrize("shape", [(1, 3, 3), (2, 2, 2), (3, 3, 3)])
def test_a_mixing_that_does_not_fit_is_refused(shape: tuple[int, int, int]):
    with pytest.raises(AdapterError, match="do not fit"):
        Mixing("A", np.zeros(shape)).applied(drawn([(4, 5), (6, 7)], 3, 0))


def test_a_mixing_of_a_factor_that_is_not_there_is_refused():
    with pytest.raises(AdapterError, match="do not fit"):
        Mixing("A", np.zeros((1, 2, 2))).applied(drawn([(4, 5)], 2, 0).part("B"))


@given(widths=WIDTHS, rank=st.integers(1, 4), seed=st.integers(0, 10**6), factor=FACTOR)
def test_the_product_stays(widths: list[tuple[int, int]], rank: int, seed: int, factor: Factor):
    state = drawn(widths, rank, seed)
    found = orthonormal(state, factor)[0]
    for after, before in zip(products(found), products(state), strict=True):
        np.testing.assert_allclose(after, before, atol=1e-6 * state.norm() ** 2)


@given(widths=WIDTHS, rank=st.integers(1, 4), seed=st.integers(0, 10**6), factor=FACTOR)
def test_columns_are_orthonormal_as_far_as_the_module_is_wide(
    widths: list[tuple[int, int]], rank: int, seed: int, factor: Factor
):
    for found in columns(orthonormal(drawn(widths, rank, seed), factor)[0], factor):
        expected = np.diag((np.arange(rank) < len(found)).astype(float))
        np.testing.assert_allclose(found.T @ found, expected, atol=1e-6)


@given(widths=WIDTHS, rank=st.integers(1, 4), seed=st.integers(0, 10**6), factor=FACTOR)
def test_the_other_factor_follows_bit_for_bit(
    widths: list[tuple[int, int]], rank: int, seed: int, factor: Factor
):
    state = drawn(widths, rank, seed)
    found, mixing = orthonormal(state, factor)
    assert {mixing.factor, factor} == {"A", "B"}
    followed = mixing.applied(state).part(mixing.factor)
    assert torch.equal(followed.values, found.part(mixing.factor).values)


@pytest.mark.parametrize("factor", ["A", "B"])
def test_the_first_columns_span_what_the_first_ones_did(factor: Factor):
    state = drawn([(9, 8)], 4, 0)
    (before,), (after,) = columns(state, factor), columns(orthonormal(state, factor)[0], factor)
    for count in range(1, 5):
        basis = after[:, :count]
        inside = basis @ (basis.T @ before[:, :count])
        np.testing.assert_allclose(inside, before[:, :count], atol=1e-5)


@given(widths=WIDTHS, rank=st.integers(1, 4), seed=st.integers(0, 10**6), factor=FACTOR)
def test_no_direction_is_mirrored(
    widths: list[tuple[int, int]], rank: int, seed: int, factor: Factor
):
    mixing = orthonormal(drawn(widths, rank, seed), factor)[1]
    assert (np.diagonal(mixing.matrices, axis1=1, axis2=2) >= 0).all()


def test_an_orthonormal_factor_is_its_own_gauge():
    state = drawn([(4, 5)], 3, 0)
    a = state.part("A")
    a.values.copy_(torch.eye(3, 5).reshape(-1))
    found = orthonormal(state.with_part(a), "A")[0]
    assert torch.equal(found.values, state.with_part(a).values)


def test_the_start_of_lora_keeps_its_zeros():
    state = drawn([(4, 5)], 2, 0)
    zero = state.with_part(AdapterState(state.schema.part("B"), torch.zeros(8)))
    assert not orthonormal(zero, "A")[0].part("B").values.any()


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_a_factor_of_a_lower_rank_gets_orthonormal_columns(kept: int):
    state = drawn([(6, 5)], 3, 0)
    b = state.part("B")
    b.values.view(6, 3)[:, kept:] = 0
    found = orthonormal(state.with_part(b), "B")[0]
    (basis,) = columns(found, "B")
    np.testing.assert_allclose(basis.T @ basis, np.eye(3), atol=1e-6)
    np.testing.assert_allclose(products(found)[0], products(state.with_part(b))[0], atol=1e-5)


def test_a_mixing_rounds_every_product_before_it_is_added():
    """A fused multiply-add, as some processors' libraries use, would leave a rest here."""
    factor, value = 1 + 2.0**-52, float(np.float32(1 + 2.0**-20))
    rounded = factor * value
    state = drawn([(4, 64)], 2, 0)
    state.tensors()["m0.lora_A.weight"].copy_(torch.tensor([[1.0] * 64, [value] * 64]))
    mixed = Mixing("A", np.array([[[-rounded, factor], [0.0, 0.0]]])).applied(state)
    assert not mixed.tensors()["m0.lora_A.weight"].any()


def test_a_mixing_adds_in_the_order_of_the_columns():
    state = drawn([(4, 1)], 3, 0)
    state.tensors()["m0.lora_A.weight"].fill_(1)
    rows = [[1.0, 1e16, -1e16], [1e16, -1e16, 1.0], [1e16, 1.0, -1e16]]
    mixed = Mixing("A", np.array([rows])).applied(state)
    assert mixed.tensors()["m0.lora_A.weight"].flatten().tolist() == [0.0, 1.0, 0.0]


def test_what_is_turned_is_a_copy():
    state = drawn([(4, 5)], 3, 0)
    before = state.values.clone()
    orthonormal(state, "A")
    orthonormal(state, "B")
    assert torch.equal(state.values, before)
