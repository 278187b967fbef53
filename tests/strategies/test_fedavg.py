"""FedAvg: the means of A and of B, and how far their product is from the mean product."""

import math

import numpy as np
import pytest
from hypothesis import given

from fedpeft.adapters import AdapterState
from fedpeft_strategies.fedavg import FedAvgFold
from tests.strategies.clinics import (
    EXACT,
    World,
    aggregated,
    dense,
    dense_changes,
    drawn,
    schema,
    served,
    strategy_of,
    unequal,
    worlds,
)
from tests.strategies.reference import distance, mean_product, norm, product_of_means, size


def error_of(world: World, changes: list[AdapterState]) -> float | None:
    strategy = strategy_of("fedavg", world.schema)
    return aggregated(strategy, world.adapter, changes, world.weights).product_error


def dense_error(world: World, changes: list[AdapterState]) -> float:
    round_ = dense(world.adapter), dense_changes(world, changes), world.weights
    mean = mean_product(*round_)
    return distance(product_of_means(*round_), mean) / norm(mean)


@given(world=worlds())
def test_the_next_adapter_is_the_last_plus_the_weighted_means(world: World):
    changes = world.changes("AB")
    result = aggregated(strategy_of("fedavg", world.schema), world.adapter, changes, world.weights)
    values = np.stack([change.values.double().numpy() for change in changes])
    expected = world.adapter.values.numpy() + np.average(values, axis=0, weights=world.weights)
    np.testing.assert_allclose(result.adapter.values.numpy(), expected, atol=1e-6)


@given(world=worlds())
def test_its_product_is_that_of_the_means(world: World):
    changes = world.changes("AB")
    round_ = dense(world.adapter), dense_changes(world, changes), world.weights
    result = aggregated(strategy_of("fedavg", world.schema), world.adapter, changes, world.weights)
    assert distance(served(result), product_of_means(*round_)) <= EXACT * size(*round_)


def test_of_a_single_change_which_may_be_a_sum_no_error_is_known():
    world = World(unequal().adapter, (8,), (1000,), 0)
    assert error_of(world, world.changes("AB")) is None


def test_the_error_is_within_what_its_docstring_promises():
    misses: list[float] = []
    for seed in range(60):
        world = unequal(seed=seed)
        changes = world.changes("AB")
        found, expected = error_of(world, changes), dense_error(world, changes)
        assert found is not None
        misses.append(found / expected - 1)
    assert math.sqrt(np.mean(np.square(misses))) <= 1 / math.sqrt(32)
    assert max(map(abs, misses)) <= 4 / math.sqrt(32)


def test_the_error_is_within_its_bound_in_the_worst_case():
    # Rank 1 in one module has the largest standard error.
    misses: list[float] = []
    for seed in range(100):
        adapter = drawn(schema([(30, 40)], 1), seed)
        world = World(adapter, (1, 1, 1), (1, 2, 3), seed)
        changes = world.changes("AB")
        found, expected = error_of(world, changes), dense_error(world, changes)
        assert found is not None
        misses.append(math.log(found / expected))
    assert math.sqrt(np.mean(np.square(misses))) <= 1 / math.sqrt(32)


def test_clinics_that_agree_have_no_error():
    world = unequal()
    found = error_of(world, [drawn(world.schema, 1)] * 3)
    assert found == pytest.approx(0, abs=1e-5)


def test_the_error_is_measured_only_if_asked_for():
    world = unequal()
    fold = FedAvgFold(world.adapter, measured=False)
    for change, weight in zip(world.changes("AB"), world.weights, strict=True):
        fold.add(change, weight)
    assert fold.result().product_error is None
