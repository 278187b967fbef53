"""The streaming mean: NumPy's in double precision, in any order, with clinics of any rank."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.adapters import DTYPES, AdapterSchema, AdapterState, TensorSpec, WeightedMean
from fedpeft.adapters import mean as mean_module
from fedpeft.errors import AdapterError, SchemaMismatch

UNIT = 2.0**-24
"""Half the distance between float32's neighbours beside 1."""
Drawn = list[tuple[AdapterState, float]]
dtypes = st.sampled_from(["float32", "float16", "bfloat16"])
rows = st.integers(1, 10**6)


def schema(
    rank: int = 2, inputs: int = 5, outputs: int = 3, dtype: str = "float32", base: str = "a"
) -> AdapterSchema:
    factors = (
        TensorSpec("m.lora_A.weight", (rank, inputs)),
        TensorSpec("m.lora_B.weight", (outputs, rank)),
    )
    return AdapterSchema(factors, base * 64, dtype)


def drawn(of: AdapterSchema, seed: int, scale: float = 1.0) -> AdapterState:
    values = torch.randn(of.numel, generator=torch.Generator().manual_seed(seed))
    return AdapterState(of, (scale * values).to(DTYPES[of.dtype]))


def mean_of(states: Sequence[AdapterState], weights: Sequence[float]) -> AdapterState:
    mean = WeightedMean(states[0].schema)
    for state, weight in zip(states, weights, strict=True):
        mean.add(state, weight)
    return mean.result()


def exact(states: Sequence[AdapterState], weights: Sequence[float]) -> np.ndarray:
    values = np.stack([state.values.double().numpy() for state in states])
    return np.average(values, axis=0, weights=np.array(weights, np.float64))


def largest(states: Sequence[AdapterState]) -> float:
    return max(float(state.values.abs().max()) for state in states)


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf, -math.inf, 1e-46, 1e39])
def test_a_weight_that_is_not_positive_and_finite_is_refused(weight: float):
    mean = WeightedMean(schema())
    with pytest.raises(AdapterError, match="weight"):
        mean.add(drawn(schema(), 0), weight)
    assert mean.weight == 0.0


def test_the_mean_of_nothing_is_refused():
    with pytest.raises(AdapterError, match="no updates"):
        WeightedMean(schema()).result()


@pytest.mark.parametrize(
    "other",
    [
        schema(base="b"),
        schema(dtype="float16"),
        schema(inputs=6),
        schema(rank=3),
        schema(rank=1, outputs=4),
        schema().part("A"),
        schema().part("B", 1),
    ],
)
def test_an_update_that_is_no_part_of_the_schema_changes_nothing(other: AdapterSchema):
    mean, alone = WeightedMean(schema()), drawn(schema(), 0)
    mean.add(alone, 2.0)
    with pytest.raises(SchemaMismatch, match="from the update"):
        mean.add(drawn(other, 1), 1.0)
    assert mean.weight == 2.0
    assert torch.equal(mean.result().values, alone.values)


def test_a_mean_is_given_once():
    mean = WeightedMean(schema())
    mean.add(drawn(schema(), 0), 1.0)
    mean.result()
    with pytest.raises(AdapterError, match="taken already"):
        mean.result()
    with pytest.raises(AdapterError, match="taken already"):
        mean.add(drawn(schema(), 1), 1.0)


@given(weights=st.lists(rows, min_size=100, max_size=100), seed=st.integers(0, 2**20))
def test_the_mean_of_a_hundred_clinics_is_that_of_double_precision(weights: list[int], seed: int):
    states = [drawn(schema(inputs=30, outputs=20), 1000 * seed + each) for each in range(100)]
    found = mean_of(states, weights).values.double().numpy()
    np.testing.assert_allclose(found, exact(states, weights), atol=1e-6 * largest(states), rtol=0)


@given(
    values=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=12),
    weights=st.lists(rows, min_size=12, max_size=12),
    repeated=st.integers(1, 8),
)
def test_no_values_round_further_than_the_stated_bound(
    values: list[float], weights: list[int], repeated: int
):
    values, weights = values * repeated, weights[: len(values)] * repeated
    states = [AdapterState(schema(), torch.full((16,), value)) for value in values]
    bound = (len(states) + 4) * UNIT * largest(states)
    found = mean_of(states, weights).values.double().numpy()
    # What is below float32's normal numbers is lost whatever the bound.
    np.testing.assert_allclose(found, exact(states, weights), atol=bound + 1e-37, rtol=0)


@given(dtype=dtypes, weights=st.lists(rows, min_size=1, max_size=9), seed=st.integers(0, 2**20))
def test_what_comes_in_half_precision_is_rounded_once(dtype: str, weights: list[int], seed: int):
    of = schema(dtype=dtype)
    states = [drawn(of, seed + each) for each in range(len(weights))]
    nearest = torch.from_numpy(exact(states, weights)).to(DTYPES[dtype])
    step = torch.finfo(DTYPES[dtype]).eps * largest(states)
    found = mean_of(states, weights).values
    torch.testing.assert_close(found, nearest, atol=step, rtol=0)
    if dtype != "float32":
        assert (found == nearest).float().mean() > 0.8


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_vector_is_the_same_in_whatever_pieces_it_is_widened(
    dtype: str, monkeypatch: pytest.MonkeyPatch
):
    of = schema(inputs=50, outputs=30, dtype=dtype)
    states = [drawn(of, seed) for seed in range(3)]
    at_once = mean_of(states, [1, 2, 3]).values
    monkeypatch.setattr(mean_module, "_PIECE", 7)
    assert torch.equal(mean_of(states, [1, 2, 3]).values, at_once)


def test_the_largest_half_precision_values_do_not_overflow():
    of = schema(dtype="float16")
    states = [AdapterState(of, torch.full((16,), 65504.0).half()) for _ in range(100)]
    assert torch.equal(mean_of(states, [10**6] * 100).values, states[0].values)


def test_a_clinic_with_eight_times_the_rows_counts_eight_times():
    states = [drawn(schema(), seed) for seed in range(3)]
    first, second, third = (state.values.double() for state in states)
    expected = (8 * first + second + third) / 10
    torch.testing.assert_close(
        mean_of(states, [8, 1, 1]).values.double(), expected, atol=1e-6, rtol=0
    )


@given(order=st.permutations(range(6)), dtype=dtypes)
def test_permuting_clinics_changes_nothing(order: list[int], dtype: str):
    states = [drawn(schema(4, dtype=dtype).part("AB", 4 - each % 3), each) for each in range(6)]
    weights = [1.0, 80.0, 3.0, 1e4, 7.0, 0.5]
    straight, permuted = (WeightedMean(schema(4, dtype=dtype)) for _ in range(2))
    for each in range(6):
        straight.add(states[each], weights[each])
        permuted.add(states[order[each]], weights[order[each]])
    tolerance = max(1e-6, torch.finfo(DTYPES[dtype]).eps) * largest(states)
    torch.testing.assert_close(
        straight.result().values, permuted.result().values, atol=tolerance, rtol=0
    )


def test_one_clinic_alone_gives_its_own_update():
    state = drawn(schema(), 0)
    torch.testing.assert_close(mean_of([state], [37.0]).values, state.values, atol=1e-7, rtol=1e-6)


def test_averaging_leaves_the_updates_alone():
    one, two = drawn(schema(), 0), drawn(schema(), 1)
    mean_of([one, two], [1, 2]).values.zero_()
    assert torch.equal(one.values, drawn(schema(), 0).values)
    assert torch.equal(two.values, drawn(schema(), 1).values)


@given(
    ranks=st.lists(st.integers(1, 4), min_size=1, max_size=7),
    weights=st.lists(rows, min_size=7, max_size=7),
    factors=st.sampled_from(["A", "B", "AB"]),
)
def test_each_column_is_the_mean_of_the_clinics_that_had_it(
    ranks: list[int], weights: list[int], factors: str
):
    of = schema(4).part(factors)  # pyright: ignore[reportArgumentType]
    states = [drawn(of.part(of.factors, rank), seed) for seed, rank in enumerate(ranks)]
    mean = WeightedMean(of)
    for state, weight in zip(states, weights, strict=False):
        mean.add(state, weight)
    assert mean.weight == pytest.approx(sum(weights[: len(ranks)]))
    found = mean.result().tensors()
    for spec in of.tensors:
        for column in range(4):
            having = [
                (_column(spec, state.tensors()[spec.name], column), weight)
                for state, weight in zip(states, weights, strict=False)
                if state.schema.rank > column
            ]
            expected = (
                np.average(
                    np.stack([values for values, _ in having]),
                    axis=0,
                    weights=[w for _, w in having],
                )
                if having
                else 0.0
            )
            seen = _column(spec, found[spec.name], column)
            np.testing.assert_allclose(seen, expected, atol=1e-6 * largest(states), rtol=0)


def _column(spec: TensorSpec, values: torch.Tensor, column: int) -> np.ndarray:
    return (values[column] if spec.factor == "A" else values[:, column]).double().numpy()


def test_columns_that_nobody_had_stay_zero():
    mean = WeightedMean(schema(4))
    mean.add(drawn(schema(2), 0), 5.0)
    rest = mean.result().tensors()
    assert not rest["m.lora_A.weight"][2:].any()
    assert not rest["m.lora_B.weight"][:, 2:].any()
    assert rest["m.lora_B.weight"][:, :2].all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_lower_rank_in_half_precision_is_summed_in_single(dtype: str):
    of = schema(2, dtype=dtype)
    one, third = AdapterState(of, torch.ones(16).to(DTYPES[dtype])), of.part("AB", 1)
    mean = WeightedMean(of)
    for _ in range(3000):
        mean.add(AdapterState(third, torch.ones(8).to(DTYPES[dtype])), 1.0)
    mean.add(one, 1.0)
    assert torch.equal(mean.result().values, one.values)
