"""FedEx-LoRA: FedAvg's adapter and its residual in the base make the exact mean product."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from fedpeft.adapters import AdapterState
from fedpeft.errors import SchemaMismatch
from tests.strategies.clinics import (
    EXACT,
    World,
    aggregated,
    dense,
    drawn,
    schema,
    served,
    strategy_of,
    turned,
    unequal,
    worlds,
)
from tests.strategies.reference import distance, mean_product, norm, product, size


def test_a_clinic_of_a_lower_rank_is_refused():
    world = unequal(ranks=(2, 8, 8))
    fold = strategy_of("fedex", world.schema).fold(1, world.adapter)
    with pytest.raises(SchemaMismatch):
        fold.add(world.changes("AB")[0], 1)


@settings(deadline=None)
@given(world=worlds())
def test_adapter_and_base_together_have_the_mean_of_the_products(world: World):
    changes = world.changes("AB")
    result = aggregated(strategy_of("fedex", world.schema), world.adapter, changes, world.weights)
    round_ = dense(world.adapter), [dense(change) for change in changes], world.weights
    assert distance(served(result), mean_product(*round_)) <= EXACT * size(*round_)


@settings(deadline=None)
@given(world=worlds())
def test_its_adapter_is_that_of_fedavg(world: World):
    changes = world.changes("AB")
    found, fedavg = (
        aggregated(strategy_of(name, world.schema), world.adapter, changes, world.weights)
        for name in ("fedex", "fedavg")
    )
    assert torch.equal(found.adapter.values, fedavg.adapter.values)


def test_a_residual_is_no_wider_than_it_must_be():
    world = unequal()
    changes = world.changes("AB")
    strategy = strategy_of("fedex", world.schema)
    increment = aggregated(strategy, world.adapter, changes, world.weights).increment
    assert increment is not None
    # Three clinics of rank 8 would need 16, and the widest module has 12 at most.
    assert increment.schema.rank == 12
    assert aggregated(strategy, world.adapter, changes[:1], [1]).increment is None


def test_clinics_that_differ_little_have_an_accurate_residual():
    # Σ p_i·B_i·A_i − B̄·Ā would lose this residual, a ten-millionth of the products, entirely.
    world = unequal()
    changes = [drawn(world.schema, seed) for seed in (1, 2, 3)]
    for change in changes:
        change.values.mul_(3e-4)
    increment = aggregated(
        strategy_of("fedex", world.schema), world.adapter, changes, world.weights
    ).increment
    assert increment is not None
    expected = {}
    for module in dense(world.adapter):
        pairs = [dense(change)[module] for change in changes]
        b, a = (
            sum(p * pair[i] for p, pair in zip((0.8, 0.1, 0.1), pairs, strict=True)) for i in (0, 1)
        )
        own = sum(p * (x - b) @ (y - a) for p, (x, y) in zip((0.8, 0.1, 0.1), pairs, strict=True))
        expected[module] = own
    assert distance(product(dense(increment)), expected) <= 1e-4 * norm(expected)


def test_a_linear_layer_with_the_residual_answers_as_the_clinics_do_on_average():
    # Added transposed, as public code has done, it would not even fit this layer.
    torch.manual_seed(0)
    adapter = drawn(schema([(6, 10)], 2), 0)
    world = World(adapter, (2, 2, 2), (8, 1, 1), 0)
    changes = world.changes("AB")
    result = aggregated(strategy_of("fedex", world.schema), adapter, changes, world.weights)
    assert result.increment is not None
    layer, inputs = torch.nn.Linear(10, 6), torch.randn(5, 10)

    def answer(*states: AdapterState) -> torch.Tensor:
        weight = layer.weight.double()
        for state in states:
            a, b = state.tensors().values()
            weight = weight + b.double() @ a.double()
        return torch.nn.functional.linear(inputs.double(), weight, layer.bias.double())

    clinics = [answer(adapter.plus(change)) for change in changes]
    expected = 0.8 * clinics[0] + 0.1 * clinics[1] + 0.1 * clinics[2]
    torch.testing.assert_close(
        answer(result.adapter, result.increment), expected, atol=1e-5, rtol=0
    )


def test_a_clinic_may_turn_its_pair():
    world = unequal()
    first, *others = world.changes("AB")
    strategy = strategy_of("fedex", world.schema)
    straight = aggregated(strategy, world.adapter, [first, *others], world.weights)
    changes = [turned(world.adapter, first), *others]
    found = aggregated(strategy, world.adapter, changes, world.weights)
    assert not np.allclose(found.adapter.values, straight.adapter.values, atol=0.1)
    assert distance(served(found), served(straight)) <= 1e-4 * norm(served(straight))
