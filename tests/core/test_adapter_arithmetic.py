"""Adding, subtracting and averaging adapters, against NumPy in double precision."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.adapters import AdapterSchema, AdapterState, TensorSpec, WeightedMean
from fedpeft.errors import AdapterError, NotFinite, SchemaMismatch


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


def mean_of(states: Sequence[AdapterState], weights: Sequence[float]) -> AdapterState:
    mean = WeightedMean(states[0].schema)
    for state, weight in zip(states, weights, strict=True):
        mean.add(state, weight)
    return mean.result()


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf])
def test_a_weight_that_is_not_positive_and_finite_is_refused(weight: float):
    with pytest.raises(AdapterError, match="weight"):
        WeightedMean(schema()).add(drawn(schema(), 0), weight)


def test_the_mean_of_nothing_is_refused():
    with pytest.raises(AdapterError, match="no updates"):
        WeightedMean(schema()).result()


def test_an_update_for_another_base_model_is_refused():
    mean = WeightedMean(schema())
    with pytest.raises(SchemaMismatch):
        mean.add(drawn(schema(fingerprint="b"), 0), 1.0)
    assert mean.weight == 0.0


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


@given(
    rank=st.integers(1, 4),
    inputs=st.integers(1, 9),
    outputs=st.integers(1, 9),
    weights=st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=5),
)
def test_the_mean_is_numpys(rank: int, inputs: int, outputs: int, weights: list[float]):
    states = [drawn(schema(rank, inputs, outputs), seed) for seed in range(len(weights))]
    values = np.stack([state.values.numpy().astype(np.float64) for state in states])
    expected = np.average(values, axis=0, weights=weights)
    np.testing.assert_allclose(mean_of(states, weights).values.numpy(), expected, atol=1e-6)


def test_a_clinic_with_eight_times_the_rows_counts_eight_times():
    states = [drawn(schema(), seed) for seed in range(3)]
    first, second, third = (state.values.double() for state in states)
    expected = (8 * first + second + third) / 10
    torch.testing.assert_close(
        mean_of(states, [8, 1, 1]).values.double(), expected, atol=1e-6, rtol=0
    )


@given(order=st.permutations(range(6)))
def test_the_order_of_arrival_does_not_matter(order: list[int]):
    states = [drawn(schema(), seed) for seed in range(6)]
    weights = [1.0, 80.0, 3.0, 1e4, 7.0, 0.5]
    straight = mean_of(states, weights)
    permuted = mean_of([states[i] for i in order], [weights[i] for i in order])
    torch.testing.assert_close(straight.values, permuted.values, atol=1e-6, rtol=0)


def test_one_clinic_alone_gives_its_own_update():
    state = drawn(schema(), 0)
    torch.testing.assert_close(mean_of([state], [37.0]).values, state.values, atol=1e-7, rtol=1e-6)


def test_a_change_leads_from_the_one_to_the_other():
    before, after = drawn(schema(), 0), drawn(schema(), 1)
    change = after.minus(before)
    torch.testing.assert_close(change.values, after.values - before.values)
    torch.testing.assert_close(before.plus(change).values, after.values)


def test_arithmetic_leaves_its_operands_alone():
    one, two = drawn(schema(), 0), drawn(schema(), 1)
    mean_of([one, two], [1, 2])
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
