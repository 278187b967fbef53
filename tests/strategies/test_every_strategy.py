"""What holds for all strategies, or for all that claim it in their declaration."""

import weakref
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.adapters import AdapterState, initial_state
from fedpeft.errors import AdapterError, SchemaMismatch
from fedpeft_strategies import STRATEGIES, Aggregated, declarations
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
from tests.strategies.reference import distance, mean_product, norm, product, size

ALL = pytest.mark.parametrize("name", STRATEGIES)
WEIGHING = pytest.mark.parametrize(
    "name", [each.name for each in declarations() if not each.tolerates and not each.personal]
)
MEANS = ["fedavg", "alternating", "ffa", "flexlora", "fedex", "flora", "fedprox"]
EXACT_MEANS = [each.name for each in declarations() if each.exact == "yes"]
LINEAR = [each.name for each in declarations() if each.linear]
STREAMED = [*LINEAR, "norm-bound"]
ORDER = [
    *("fedavg", "alternating", "ffa", "flexlora", "fedex", "flora", "fedsa", "fedprox"),
    *("fedavgm", "fedadam", "fedyogi", "fedadagrad"),
    *("median", "trimmed-mean", "multi-krum", "norm-bound"),
]


def five(seed: int = 0) -> World:
    """As many clinics as the most demanding strategy asks for."""
    return World(unequal(seed=seed).adapter, (8,) * 5, (500, 100, 200, 50, 150), seed)


def one_round(name: str, world: World, order: Sequence[int] | None = None) -> Aggregated:
    strategy = strategy_of(name, world.schema, max_norm=1.0)
    changes = world.changes(strategy.sends(1))
    chosen = range(len(changes)) if order is None else order
    return aggregated(
        strategy,
        world.adapter,
        [changes[index] for index in chosen],
        [world.weights[index] for index in chosen],
    )


def test_the_table_is_in_its_order():
    assert list(STRATEGIES) == ORDER
    assert [each.name for each in declarations()] == ORDER


@ALL
def test_a_round_of_no_updates_is_refused(name: str):
    world = unequal()
    with pytest.raises(AdapterError):
        strategy_of(name, world.schema).fold(1, world.adapter).result()


@ALL
def test_an_update_for_another_base_model_is_refused(name: str):
    world = unequal()
    strategy = strategy_of(name, world.schema)
    foreign = drawn(schema([(12, 20), (17, 9)], 8, "b"), 1).part(strategy.sends(1))
    with pytest.raises(SchemaMismatch):
        strategy.fold(1, world.adapter).add(foreign, 1)


@WEIGHING
@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_that_is_not_positive_and_finite_is_refused(name: str, weight: float):
    world = unequal()
    strategy = strategy_of(name, world.schema)
    with pytest.raises(AdapterError, match="weight"):
        strategy.fold(1, world.adapter).add(world.changes(strategy.sends(1))[0], weight)


@ALL
@settings(deadline=None, max_examples=10)
@given(order=st.permutations(range(5)))
def test_permuting_clinics_changes_nothing(name: str, order: list[int]):
    straight, permuted = one_round(name, five()), one_round(name, five(), order)
    assert distance(served(permuted), served(straight)) <= EXACT * five().adapter.norm() ** 2


@pytest.mark.parametrize("name", MEANS)
@settings(deadline=None)
@given(world=worlds(most=1))
def test_one_clinic_alone_gives_its_own_product(name: str, world: World):
    strategy = strategy_of(name, world.schema)
    (change,) = world.changes(strategy.sends(1))
    result = aggregated(strategy, world.adapter, [change], world.weights)
    round_ = dense(world.adapter), dense_changes(world, [change]), world.weights
    assert distance(served(result), mean_product(*round_)) <= EXACT * size(*round_)


@pytest.mark.parametrize("name", EXACT_MEANS)
def test_weights_of_eight_to_one_to_one_are_those_of_the_product(name: str):
    world = unequal()
    strategy = strategy_of(name, world.schema)
    changes = world.changes(strategy.sends(1))
    clinics = [product(dense(world.adapter.plus(_of_both(change, world)))) for change in changes]
    expected = {
        module: 0.8 * clinics[0][module] + 0.1 * clinics[1][module] + 0.1 * clinics[2][module]
        for module in clinics[0]
    }
    found = served(aggregated(strategy, world.adapter, changes, world.weights))
    assert distance(found, expected) <= EXACT * norm(expected)


def _of_both(change: AdapterState, world: World) -> AdapterState:
    nothing = AdapterState(world.schema, torch.zeros(world.schema.numel))
    return nothing.with_part(change)


@pytest.mark.parametrize("name", EXACT_MEANS)
def test_the_weighted_adapter_of_the_first_clinic_would_not_pass(name: str):
    """A baseline in public code returns it; the reference must tell the two apart."""
    world = unequal()
    strategy = strategy_of(name, world.schema)
    changes = world.changes(strategy.sends(1))
    round_ = dense(world.adapter), dense_changes(world, changes), world.weights
    first = aggregated(strategy, world.adapter, changes[:1], world.weights[:1])
    scaled = {module: 0.8 * matrix for module, matrix in served(first).items()}
    for wrong in (served(first), scaled):
        assert distance(wrong, mean_product(*round_)) > 1000 * EXACT * size(*round_)


@pytest.mark.parametrize("name", LINEAR)
def test_the_mean_change_stands_for_all_of_them(name: str):
    """What secure aggregation rests on: the server sees only this."""
    world = unequal()
    strategy = strategy_of(name, world.schema)
    changes = world.changes(strategy.sends(1))
    values = torch.stack([change.values.double() for change in changes])
    weights = torch.tensor(world.weights).double()
    total = (weights @ values / weights.sum()).float()
    mean = AdapterState(changes[0].schema, total)
    each = aggregated(strategy, world.adapter, changes, world.weights)
    fresh = strategy_of(name, world.schema)
    together = aggregated(fresh, world.adapter, [mean], [sum(world.weights)])
    torch.testing.assert_close(together.adapter.values, each.adapter.values, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", STREAMED)
def test_changes_are_not_kept(name: str):
    world = five()
    strategy = strategy_of(name, world.schema, max_norm=1.0)
    fold, alive = strategy.fold(1, world.adapter), list[weakref.ref[AdapterState]]()
    for change in world.changes(strategy.sends(1)):
        kept = AdapterState(change.schema, change.values.clone())
        alive.append(weakref.ref(kept))
        fold.add(kept, 1.0)
        del kept
    assert not [each for each in alive if each() is not None]


@ALL
def test_a_round_changes_neither_the_adapter_nor_the_changes(name: str):
    world = five()
    strategy = strategy_of(name, world.schema, max_norm=1.0)
    changes = world.changes(strategy.sends(1))
    before = [state.values.clone() for state in (world.adapter, *changes)]
    aggregated(strategy, world.adapter, changes, world.weights)
    for state, values in zip((world.adapter, *changes), before, strict=True):
        assert torch.equal(state.values, values)


@ALL
def test_only_a_declared_strategy_changes_the_base(name: str):
    assert (one_round(name, five()).increment is not None) == (
        STRATEGIES[name].declaration.changes_base
    )


@ALL
def test_training_begins_with_a_product_of_zero(name: str):
    start = strategy_of(name, unequal().schema).start(initial_state(unequal().schema, 0))
    assert not start.part("B").values.any()


@ALL
def test_the_first_round_trains_b_which_alone_can_learn_from_zero(name: str):
    assert "B" in strategy_of(name, unequal().schema).trains(1)
