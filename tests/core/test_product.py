"""Sums and cuts of products, against dense NumPy."""

import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.adapters import (
    AdapterSchema,
    AdapterState,
    TensorSpec,
    full_rank,
    pairs,
    product_norm,
    stacked,
    truncated,
)
from fedpeft.errors import AdapterError, SchemaMismatch

WIDTHS = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=3)


def drawn(
    widths: list[tuple[int, int]], rank: int, seed: int, fingerprint: str = "a"
) -> AdapterState:
    tensors: list[TensorSpec] = []
    for index, (outputs, inputs) in enumerate(widths):
        tensors.append(TensorSpec(f"m{index}.lora_A.weight", (rank, inputs)))
        tensors.append(TensorSpec(f"m{index}.lora_B.weight", (outputs, rank)))
    schema = AdapterSchema(tuple(tensors), fingerprint * 64)
    values = torch.randn(schema.numel, generator=torch.Generator().manual_seed(seed))
    return AdapterState(schema, values)


def products(state: AdapterState) -> list[np.ndarray]:
    tensors = [tensor.double().numpy() for tensor in state.tensors().values()]
    return [b @ a for a, b in zip(tensors[::2], tensors[1::2], strict=True)]


def test_a_sum_of_nothing_is_refused():
    with pytest.raises(AdapterError, match="no products"):
        stacked([])


def test_a_sum_over_two_base_models_is_refused():
    with pytest.raises(SchemaMismatch):
        stacked([(drawn([(2, 3)], 1, 0), 1.0), (drawn([(2, 3)], 1, 0, "b"), 1.0)])


def test_a_sum_over_other_widths_is_refused():
    with pytest.raises(SchemaMismatch):
        stacked([(drawn([(2, 3)], 1, 0), 1.0), (drawn([(3, 2)], 1, 0), 1.0)])


@pytest.mark.parametrize("rank", [0, -1])
def test_a_cut_to_no_rank_is_refused(rank: int):
    with pytest.raises(AdapterError, match=f"rank {rank}"):
        truncated(drawn([(2, 3)], 1, 0), rank)


def test_one_factor_alone_has_no_product():
    with pytest.raises(AdapterError, match="module m0 has only factor B"):
        truncated(drawn([(2, 3)], 1, 0).part("B"), 1)


@given(
    widths=WIDTHS,
    parts=st.lists(
        st.tuples(st.integers(1, 4), st.floats(-3, 3, width=32)), min_size=1, max_size=4
    ),
    seed=st.integers(0, 10**6),
)
def test_stacked_factors_have_the_sum_of_the_products(
    widths: list[tuple[int, int]], parts: list[tuple[int, float]], seed: int
):
    states = [drawn(widths, rank, seed + index) for index, (rank, _) in enumerate(parts)]
    weights = [weight for _, weight in parts]
    found = stacked(list(zip(states, weights, strict=True)))
    assert found.schema.rank == sum(rank for rank, _ in parts)
    dense = [products(state) for state in states]
    for module, matrix in enumerate(products(found)):
        expected = sum(weight * each[module] for weight, each in zip(weights, dense, strict=True))
        np.testing.assert_allclose(matrix, expected, atol=1e-4)


@given(widths=WIDTHS, rank=st.integers(1, 6), to=st.integers(1, 8), seed=st.integers(0, 10**6))
def test_a_cut_is_the_best_of_its_rank(
    widths: list[tuple[int, int]], rank: int, to: int, seed: int
):
    state = drawn(widths, rank, seed)
    found = truncated(state, to)
    assert found.schema.rank == to
    for after, before in zip(products(found), products(state), strict=True):
        lost = np.linalg.svd(before, compute_uv=False)[to:]
        whole = np.linalg.norm(before)
        assert np.linalg.norm(after - before) <= np.linalg.norm(lost) + 1e-5 * whole


@given(widths=WIDTHS, rank=st.integers(1, 6), to=st.integers(1, 8), seed=st.integers(0, 10**6))
def test_a_cut_shows_the_singular_values_in_both_factors(
    widths: list[tuple[int, int]], rank: int, to: int, seed: int
):
    state = drawn(widths, rank, seed)
    for (b, a), before in zip(pairs(truncated(state, to)), products(state), strict=True):
        values = np.zeros(to)
        expected = np.linalg.svd(before, compute_uv=False)[: min(to, rank)]
        values[: len(expected)] = expected
        limit = 1e-5 * values[0]
        np.testing.assert_allclose((b.T @ b).numpy(), np.diag(values), atol=limit)
        np.testing.assert_allclose((a @ a.T).numpy(), np.diag(values), atol=limit)


def test_the_first_columns_of_a_cut_are_the_best_of_each_lower_rank():
    state = drawn([(9, 7), (4, 8)], 5, 0)
    cut = truncated(state, 4)
    for rank in range(1, 5):
        first, best = products(cut.part("AB", rank)), products(truncated(state, rank))
        for found, expected in zip(first, best, strict=True):
            np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_cut_does_not_depend_on_how_the_product_was_written():
    state = drawn([(9, 7)], 3, 0)
    ((b, a),) = pairs(state)
    turned = AdapterState(state.schema, state.values.clone())
    mixing = torch.randn(3, 3, generator=torch.Generator().manual_seed(1))
    ((new_b, new_a),) = pairs(turned)
    new_b.copy_(b @ mixing)
    new_a.copy_(torch.linalg.solve(mixing.double(), a.double()))
    found, expected = truncated(turned, 2), truncated(state, 2)
    torch.testing.assert_close(found.values, expected.values, atol=1e-4, rtol=0)


def test_the_largest_entry_of_a_column_is_positive():
    for b, _ in pairs(truncated(drawn([(9, 7), (5, 6)], 3, 0), 3)):
        assert bool((b.max(dim=0).values >= -b.min(dim=0).values).all())


def test_a_product_of_zero_stays_zero():
    state = drawn([(9, 7)], 3, 0)
    nothing = AdapterState(state.schema, torch.zeros(state.schema.numel))
    assert not truncated(nothing, 2).values.any()
    assert product_norm(nothing) == 0


@given(widths=WIDTHS, rank=st.integers(1, 6), seed=st.integers(0, 10**6))
def test_the_norm_is_that_of_all_products(widths: list[tuple[int, int]], rank: int, seed: int):
    state = drawn(widths, rank, seed)
    expected = np.sqrt(sum(np.sum(matrix**2) for matrix in products(state)))
    assert product_norm(state) == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_no_module_has_more_than_the_full_rank():
    assert full_rank(drawn([(9, 2), (3, 8), (1, 1)], 5, 0)) == 3


def test_no_dense_product_is_formed():
    state = drawn([(20_000, 10_000)], 2, 0)
    tracemalloc.start()
    truncated(stacked([(state, 1.0), (state, -0.5)]), 2)
    product_norm(state)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 20e6
