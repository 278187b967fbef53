"""FedProx at the server is its inner strategy."""

import pytest
import torch

from fedpeft.adapters import AdapterSchema, AdapterState, TensorSpec
from fedpeft.config import StrategySettings
from fedpeft.errors import AdapterError, ConfigError
from fedpeft_strategies.alternating import Alternating
from fedpeft_strategies.fedavg import FedAvg
from fedpeft_strategies.ffa import Ffa
from fedpeft_strategies.proximal import FedProx
from fedpeft_strategies.strategy import Aggregated, Strategy

SCHEMA = AdapterSchema(
    (TensorSpec("m.lora_A.weight", (2, 7)), TensorSpec("m.lora_B.weight", (5, 2))), "a" * 64
)
CASES = [
    (FedAvg, StrategySettings()),
    (FedAvg, StrategySettings(inner="fedavg")),
    (Alternating, StrategySettings(inner="alternating")),
    (Ffa, StrategySettings(inner="ffa")),
    (Ffa, StrategySettings(inner="ffa", reorthonormalize=True)),
]


def drawn(seed: int, schema: AdapterSchema = SCHEMA) -> AdapterState:
    generator = torch.Generator().manual_seed(seed)
    return AdapterState(schema, torch.randn(schema.numel, generator=generator))


def after_round(strategy: Strategy, number: int, adapter: AdapterState) -> Aggregated:
    fold = strategy.fold(number, adapter)
    for seed, weight in ((1, 800.0), (2, 100.0), (3, 100.0)):
        fold.add(drawn(10 * number + seed, SCHEMA.part(strategy.sends(number))), weight)
    return fold.result()


@pytest.mark.parametrize("inner", ["flora", "fedprox", "median"])
def test_an_inner_strategy_that_it_cannot_wrap_is_refused(inner: str):
    with pytest.raises(ConfigError, match=f"{inner!r} cannot stand inside 'fedprox'"):
        FedProx(SCHEMA, StrategySettings(inner=inner))


def test_a_memory_of_something_else_is_refused():
    with pytest.raises(AdapterError, match="keeps nothing"):
        FedProx(SCHEMA, StrategySettings()).recall({"AB.steps": torch.ones(1)})


@pytest.mark.parametrize(("kind", "settings"), CASES)
def test_every_round_is_the_inner_strategys(kind: type[Strategy], settings: StrategySettings):
    strategy, inner = FedProx(SCHEMA, settings), kind(SCHEMA, settings)
    adapter = inner.start(drawn(0))
    assert torch.equal(strategy.start(drawn(0)).values, adapter.values)
    for number in range(1, 5):
        assert strategy.trains(number) == inner.trains(number)
        assert strategy.sends(number) == inner.sends(number)
        found, expected = (after_round(each, number, adapter) for each in (strategy, inner))
        assert torch.equal(found.adapter.values, expected.adapter.values)
        assert (found.mixing is None) == (expected.mixing is None)
        if found.mixing is not None and expected.mixing is not None:
            assert found.mixing.factor == expected.mixing.factor
            assert (found.mixing.matrices == expected.mixing.matrices).all()
        assert found.product_error == expected.product_error
        assert strategy.memory() == inner.memory()
        adapter = found.adapter
