"""FedSA-LoRA: A is averaged and B is nobody's but the clinic's."""

import numpy as np
import pytest
import torch
from hypothesis import given

from fedpeft.errors import SchemaMismatch
from tests.strategies.clinics import World, aggregated, strategy_of, unequal, worlds


def test_a_clinic_that_sends_its_b_is_refused():
    world = unequal()
    with pytest.raises(SchemaMismatch):
        strategy_of("fedsa", world.schema).fold(1, world.adapter).add(world.changes("AB")[0], 1)


@pytest.mark.parametrize("number", [1, 2])
def test_both_factors_are_trained_and_one_is_sent(number: int):
    strategy = strategy_of("fedsa", unequal().schema)
    assert (strategy.trains(number), strategy.sends(number)) == ("AB", "A")


@given(world=worlds())
def test_a_is_the_weighted_mean_and_b_stays(world: World):
    changes = world.changes("A")
    result = aggregated(strategy_of("fedsa", world.schema), world.adapter, changes, world.weights)
    values = np.stack([change.values.double().numpy() for change in changes])
    start = world.adapter.part("A").values.numpy()
    expected = start + np.average(values, axis=0, weights=world.weights)
    np.testing.assert_allclose(result.adapter.part("A").values.numpy(), expected, atol=1e-6)
    assert torch.equal(result.adapter.part("B").values, world.adapter.part("B").values)
    assert (result.increment, result.mixing, result.product_error) == (None, None, None)
