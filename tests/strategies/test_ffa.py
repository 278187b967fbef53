"""FFA-LoRA and FedSVD: A is shared, so the mean of B is the mean of the products."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from fedpeft.adapters import AdapterState, initial_state
from fedpeft.errors import SchemaMismatch
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
from tests.strategies.reference import distance, mean_product, product, size

BOTH = pytest.mark.parametrize("reorthonormalize", [False, True])


def test_a_change_of_a_is_refused():
    world = unequal()
    with pytest.raises(SchemaMismatch):
        strategy_of("ffa", world.schema).fold(1, world.adapter).add(world.changes("A")[0], 1)


@BOTH
@settings(deadline=None)
@given(world=worlds())
def test_every_round_has_the_mean_of_the_products(reorthonormalize: bool, world: World):
    strategy = strategy_of("ffa", world.schema, reorthonormalize=reorthonormalize)
    adapter = strategy.start(world.adapter)
    for number in range(1, 5):
        changes = world.changes(strategy.sends(number), number)
        result = aggregated(strategy, adapter, changes, world.weights, number)
        round_ = dense(adapter), dense_changes(world, changes), world.weights
        assert distance(served(result), mean_product(*round_)) <= EXACT * size(*round_)
        adapter = result.adapter


def test_a_never_changes():
    world = unequal()
    strategy = strategy_of("ffa", world.schema)
    result = aggregated(strategy, strategy.start(world.adapter), world.changes("B"), world.weights)
    assert result.mixing is None
    assert torch.equal(result.adapter.part("A").values, world.adapter.part("A").values)


def test_with_fedsvd_the_factors_are_the_singular_ones():
    world = unequal()
    strategy = strategy_of("ffa", world.schema, reorthonormalize=True)
    adapter = strategy.start(world.adapter)
    for number in range(1, 5):
        changes = world.changes("B", number)
        result = aggregated(strategy, adapter, changes, world.weights, number)
        mean = mean_product(dense(adapter), dense_changes(world, changes), world.weights)
        for module, (b, a) in dense(result.adapter).items():
            values = np.linalg.svd(mean[module], compute_uv=False)[:8]
            np.testing.assert_allclose(a @ a.T, np.eye(8), atol=1e-6)
            np.testing.assert_allclose(b.T @ b, np.diag(values**2), atol=1e-5 * values[0] ** 2)
        adapter = result.adapter


@settings(deadline=None)
@given(world=worlds())
def test_with_fedsvd_clinics_follow_a_bit_for_bit(world: World):
    strategy = strategy_of("ffa", world.schema, reorthonormalize=True)
    adapter = strategy.start(world.adapter)
    result = aggregated(strategy, adapter, world.changes("B"), world.weights)
    assert result.mixing is not None
    followed = result.mixing.applied(adapter).part("A")
    assert torch.equal(followed.values, result.adapter.part("A").values)


def test_fedsvd_stays_orthonormal_over_many_rounds():
    world = unequal()
    strategy = strategy_of("ffa", world.schema, reorthonormalize=True)
    adapter = strategy.start(world.adapter)
    for number in range(1, 201):
        changes = world.changes("B", number)
        adapter = aggregated(strategy, adapter, changes, world.weights, number).adapter
    for _, a in dense(adapter).values():
        np.testing.assert_allclose(a @ a.T, np.eye(8), atol=1e-6)


@pytest.mark.parametrize("trained", [0, 1, 3])
def test_fedsvd_of_a_b_of_lower_rank_keeps_an_orthonormal_a(trained: int):
    of = schema([(12, 20)], 4)
    strategy = strategy_of("ffa", of, reorthonormalize=True)
    adapter = strategy.start(initial_state(of, 0))
    change = drawn(of.part("B"), 1)
    change.values.view(12, 4)[:, trained:] = 0
    result = aggregated(strategy, adapter, [change], [1])
    ((_, a),) = dense(result.adapter).values()
    np.testing.assert_allclose(a @ a.T, np.eye(4), atol=1e-6)
    expected = product(dense(adapter.with_part(change)))
    assert distance(served(result), expected) <= 1e-5


def test_fedsvd_of_a_rank_beyond_the_modules_width_loses_nothing():
    adapter = drawn(schema([(2, 3), (6, 1)], 4), 0)
    strategy = strategy_of("ffa", adapter.schema, reorthonormalize=True)
    start = strategy.start(adapter)
    change = AdapterState(adapter.schema.part("B"), torch.ones(8 * 4))
    result = aggregated(strategy, start, [change], [1])
    expected = product(dense(start.with_part(start.part("B").plus(change))))
    assert distance(served(result), expected) < 1e-5


def test_a_clinic_of_rank_2_moves_the_first_two_columns_alone():
    world = unequal(ranks=(2, 8, 2))
    changes = world.changes("B")
    result = aggregated(strategy_of("ffa", world.schema), world.adapter, changes, world.weights)
    for name, tensor in result.adapter.minus(world.adapter).part("B").tensors().items():
        torch.testing.assert_close(tensor[:, 2:], changes[1].tensors()[name][:, 2:])
