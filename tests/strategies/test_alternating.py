"""RoLoRA in the orthonormal gauge: every round gives the exact mean of the products."""

import pytest
import torch
from hypothesis import given, settings

from fedpeft.adapters import AdapterState, initial_state
from fedpeft.errors import SchemaMismatch
from fedpeft_strategies.alternating import Alternating
from fedpeft_strategies.strategy import Aggregated, Strategy
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
from tests.strategies.reference import Matrix, distance, mean_product, nested_mean, product, size


def one_round(
    strategy: Strategy, world: World, adapter: AdapterState, number: int
) -> tuple[Aggregated, list[AdapterState]]:
    changes = world.changes(strategy.sends(number), number)
    return aggregated(strategy, adapter, changes, world.weights, number), changes


def test_a_change_of_the_factor_that_rests_is_refused():
    world = unequal()
    fold = strategy_of("alternating", world.schema).fold(1, world.adapter)
    with pytest.raises(SchemaMismatch):
        fold.add(world.changes("A")[0], 1)


@settings(deadline=None)
@given(world=worlds())
def test_every_round_has_the_mean_of_the_products(world: World):
    strategy = strategy_of("alternating", world.schema)
    adapter = strategy.start(world.adapter)
    for number in range(1, 6):
        result, changes = one_round(strategy, world, adapter, number)
        round_ = dense(adapter), dense_changes(world, changes), world.weights
        assert distance(served(result), mean_product(*round_)) <= EXACT * size(*round_)
        adapter = result.adapter


@settings(deadline=None)
@given(world=worlds())
def test_clinics_follow_the_resting_factor_bit_for_bit(world: World):
    strategy = strategy_of("alternating", world.schema)
    adapter = strategy.start(world.adapter)
    for number in range(1, 5):
        result, _ = one_round(strategy, world, adapter, number)
        mixing = result.mixing
        assert mixing is not None
        assert mixing.factor == ("A" if number % 2 else "B")
        followed = mixing.applied(adapter).part(mixing.factor)
        assert torch.equal(followed.values, result.adapter.part(mixing.factor).values)
        adapter = result.adapter


def test_what_rests_in_a_round_is_orthonormal():
    world = unequal()
    strategy = strategy_of("alternating", world.schema)
    adapter = strategy.start(world.adapter)
    for number in range(1, 6):
        for b, a in dense(adapter).values():
            resting = a if strategy.trains(number) == "B" else b.T
            torch.testing.assert_close(
                torch.from_numpy(resting @ resting.T), torch.eye(8).double(), atol=1e-6, rtol=0
            )
        adapter = one_round(strategy, world, adapter, number)[0].adapter


def test_it_begins_with_b_and_with_a_product_of_zero():
    world = unequal()
    strategy = strategy_of("alternating", world.schema)
    assert [strategy.trains(number) for number in range(1, 5)] == ["B", "A", "B", "A"]
    start = strategy.start(initial_state(world.schema, 0))
    assert not start.part("B").values.any()
    assert start.part("A").values.any()


@settings(deadline=None)
@given(world=worlds(mixed=True))
def test_a_column_is_the_mean_of_those_who_trained_it(world: World):
    strategy = Alternating(world.schema, strategy_of("alternating", world.schema).settings)
    for number in (1, 2):
        result, changes = one_round(strategy, world, world.adapter, number)
        expected: dict[str, Matrix] = {}
        for module, (start_b, start_a) in dense(world.adapter).items():
            pairs = [change[module] for change in dense_changes(world, changes)]
            if number == 1:
                mean = nested_mean([b for b, _ in pairs], world.weights, world.schema.rank)
                expected[module] = (start_b + mean) @ start_a
            else:
                mean = nested_mean([a.T for _, a in pairs], world.weights, world.schema.rank)
                expected[module] = start_b @ (start_a + mean.T)
        limit = EXACT * size(dense(world.adapter), dense_changes(world, changes), world.weights)
        assert distance(served(result), expected) <= limit


def test_a_clinic_of_rank_2_moves_the_first_two_columns_alone():
    world = unequal(ranks=(2, 8, 2))
    strategy = Alternating(
        world.schema, strategy_of("alternating", world.schema).settings, gauge=False
    )
    result, changes = one_round(strategy, world, world.adapter, 1)
    beyond = result.adapter.minus(world.adapter).part("B")
    for name, tensor in beyond.tensors().items():
        torch.testing.assert_close(tensor[:, 2:], changes[1].tensors()[name][:, 2:])
        two = [change.tensors()[name][:, :2] for change in changes]
        torch.testing.assert_close(tensor[:, :2], 0.8 * two[0] + 0.1 * two[1] + 0.1 * two[2])


def test_a_column_that_nobody_trained_stays():
    world = unequal(ranks=(2, 2, 2))
    strategy = Alternating(
        world.schema, strategy_of("alternating", world.schema).settings, gauge=False
    )
    moved = one_round(strategy, world, world.adapter, 1)[0].adapter.minus(world.adapter).part("B")
    assert all(not tensor[:, 2:].any() for tensor in moved.tensors().values())


def test_without_the_gauge_the_factors_stay_in_place():
    world = unequal()
    strategy = Alternating(
        world.schema, strategy_of("alternating", world.schema).settings, gauge=False
    )
    assert strategy.start(world.adapter) is world.adapter
    result, changes = one_round(strategy, world, world.adapter, 1)
    assert result.mixing is None
    assert torch.equal(result.adapter.part("A").values, world.adapter.part("A").values)
    round_ = dense(world.adapter), dense_changes(world, changes), world.weights
    assert distance(served(result), mean_product(*round_)) <= EXACT * size(*round_)


def test_a_rank_beyond_a_modules_width_loses_nothing():
    adapter = drawn(schema([(2, 3), (6, 1)], 4), 0)
    strategy = strategy_of("alternating", adapter.schema)
    start = strategy.start(adapter)
    assert distance(product(dense(start)), product(dense(adapter))) < 1e-5
