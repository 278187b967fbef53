"""FLoRA: the stacked factors have exactly the mean product, and every round starts afresh."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from fedpeft.adapters import initial_state
from fedpeft.errors import AdapterError
from tests.strategies.clinics import (
    EXACT,
    World,
    aggregated,
    dense,
    drawn,
    served,
    strategy_of,
    turned,
    unequal,
    worlds,
)
from tests.strategies.reference import distance, mean_product, norm, product, size


def test_a_clinic_of_a_rank_beyond_the_adapters_is_refused():
    world = unequal()
    fold = strategy_of("flora", world.schema).fold(1, world.adapter)
    with pytest.raises(AdapterError):
        fold.add(drawn(world.schema.of_rank(9), 1), 1)


@settings(deadline=None)
@given(world=worlds(mixed=True))
def test_the_base_gets_the_mean_of_the_products(world: World):
    changes = world.changes("AB")
    result = aggregated(strategy_of("flora", world.schema), world.adapter, changes, world.weights)
    assert result.increment is not None
    assert result.increment.schema.rank == sum(world.ranks)
    round_ = dense(world.adapter), [dense(change) for change in changes], world.weights
    assert distance(served(result), mean_product(*round_)) <= EXACT * size(*round_)


def test_a_clinic_may_turn_its_pair():
    world = unequal()
    first, *others = world.changes("AB")
    strategy = strategy_of("flora", world.schema)
    straight = aggregated(strategy, world.adapter, [first, *others], world.weights)
    changes = [turned(world.adapter, first), *others]
    found = aggregated(strategy, world.adapter, changes, world.weights)
    assert distance(served(found), served(straight)) <= 1e-4 * norm(served(straight))


def test_a_round_leaves_a_fresh_adapter_that_is_the_same_for_everybody():
    world = unequal()
    strategy = strategy_of("flora", world.schema)
    first, again, second = (
        aggregated(strategy, world.adapter, world.changes("AB"), world.weights, number).adapter
        for number in (1, 1, 2)
    )
    assert torch.equal(first.values, again.values)
    assert not torch.equal(first.values, second.values)
    for b, a in dense(first).values():
        assert not b.any()
        assert 0.5 / math.sqrt(a.shape[1]) < np.abs(a).max() <= 1 / math.sqrt(a.shape[1])


def test_many_rounds_add_up_to_what_clinics_learnt():
    """Public code of FLoRA grows without bound: it merges the same factors again and again."""
    world = unequal(ranks=(2, 8, 4))
    strategy = strategy_of("flora", world.schema)
    adapter = strategy.start(initial_state(world.schema, 0))
    base = product(dense(adapter))
    learnt = dict(base)
    for number in range(1, 101):
        changes = world.changes("AB", number)
        for change in changes:
            change.values.mul_(0.05)
        mean = mean_product(dense(adapter), [dense(change) for change in changes], world.weights)
        result = aggregated(strategy, adapter, changes, world.weights, number)
        adapter, found = result.adapter, served(result)
        base = {module: matrix + found[module] for module, matrix in base.items()}
        learnt = {module: matrix + mean[module] for module, matrix in learnt.items()}
    assert distance(base, learnt) <= EXACT * norm(learnt)
    assert adapter.norm() < 2 * initial_state(world.schema, 0).norm()
