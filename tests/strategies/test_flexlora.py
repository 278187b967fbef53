"""FlexLoRA against a dense SVD of the dense mean product."""

import numpy as np
import pytest
from hypothesis import given, settings

from fedpeft.adapters import AdapterState
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
from tests.strategies.reference import best_of_rank, distance, mean_product, norm, size


def test_a_clinic_of_a_rank_beyond_the_adapters_is_refused():
    world = unequal()
    fold = strategy_of("flexlora", world.schema).fold(1, world.adapter)
    with pytest.raises(AdapterError):
        fold.add(drawn(world.schema.of_rank(9), 1), 1)


def test_a_change_of_one_factor_is_refused():
    world = unequal()
    fold = strategy_of("flexlora", world.schema).fold(1, world.adapter)
    with pytest.raises(AdapterError):
        fold.add(world.changes("B")[0], 1)


@settings(deadline=None)
@given(world=worlds(mixed=True))
def test_it_is_as_near_to_the_mean_product_as_its_rank_allows(world: World):
    changes = world.changes("AB")
    result = aggregated(
        strategy_of("flexlora", world.schema), world.adapter, changes, world.weights
    )
    round_ = dense(world.adapter), [dense(change) for change in changes], world.weights
    mean = mean_product(*round_)
    best = {module: best_of_rank(matrix, world.schema.rank) for module, matrix in mean.items()}
    limit = EXACT * size(*round_)
    assert distance(served(result), mean) <= distance(best, mean) + limit


@pytest.mark.parametrize("ranks", [(8, 8, 8), (2, 8, 8), (2, 4, 8)])
def test_it_is_the_truncated_svd(ranks: tuple[int, int, int]):
    world = unequal(ranks)
    changes = world.changes("AB")
    result = aggregated(
        strategy_of("flexlora", world.schema), world.adapter, changes, world.weights
    )
    mean = mean_product(dense(world.adapter), [dense(change) for change in changes], world.weights)
    best = {module: best_of_rank(matrix, 8) for module, matrix in mean.items()}
    assert distance(served(result), best) <= EXACT * norm(best)
    assert result.product_error == pytest.approx(distance(best, mean) / norm(mean), rel=1e-4)


def test_clinics_of_a_low_rank_lose_nothing():
    world = unequal(ranks=(2, 3, 3))
    changes = world.changes("AB")
    result = aggregated(
        strategy_of("flexlora", world.schema), world.adapter, changes, world.weights
    )
    mean = mean_product(dense(world.adapter), [dense(change) for change in changes], world.weights)
    assert distance(served(result), mean) <= EXACT * norm(mean)
    assert result.product_error == pytest.approx(0, abs=1e-6)


def test_the_first_columns_are_the_best_start_for_a_clinic_of_rank_2():
    world = unequal()
    result = aggregated(
        strategy_of("flexlora", world.schema), world.adapter, world.changes("AB"), world.weights
    )
    for b, a in dense(result.adapter).values():
        expected = best_of_rank(b @ a, 2)
        np.testing.assert_allclose(b[:, :2] @ a[:2], expected, atol=1e-4)


def test_a_clinic_may_turn_its_pair():
    world = unequal()
    first, *others = world.changes("AB")
    strategy = strategy_of("flexlora", world.schema)
    straight = aggregated(strategy, world.adapter, [first, *others], world.weights)
    changes = [turned(world.adapter, first), *others]
    found = aggregated(strategy, world.adapter, changes, world.weights)
    assert distance(served(found), served(straight)) <= 1e-4 * norm(served(straight))


def test_nothing_trained_gives_nothing():
    world = unequal()
    nothing = AdapterState(world.schema, world.adapter.values * 0)
    result = aggregated(strategy_of("flexlora", world.schema), nothing, [nothing], [1])
    assert not result.adapter.values.any()
    assert result.product_error is None
