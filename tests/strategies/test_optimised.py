"""Server optimisers against the papers' formulas in NumPy, to the last bit, and their memory."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from flwr.supercore.task_identity import TaskIdentity
from numpy.typing import NDArray

from fedpeft.adapters import AdapterSchema, AdapterState, Factors, TensorSpec
from fedpeft.config import StrategySettings
from fedpeft.errors import AdapterError, ConfigError
from fedpeft_strategies.alternating import Alternating
from fedpeft_strategies.fedavg import FedAvg
from fedpeft_strategies.ffa import Ffa
from fedpeft_strategies.optimised import FedAdagrad, FedAdam, FedAvgM, FedYogi, Optimised
from fedpeft_strategies.strategy import Aggregated, Strategy

SCHEMA = AdapterSchema(
    (
        TensorSpec("m.lora_A.weight", (2, 7)),
        TensorSpec("m.lora_B.weight", (5, 2)),
        TensorSpec("n.lora_A.weight", (2, 4)),
        TensorSpec("n.lora_B.weight", (9, 2)),
    ),
    "a" * 64,
)
KINDS: list[type[Optimised]] = [FedAvgM, FedAdam, FedYogi, FedAdagrad]
INNER = {"fedavg": FedAvg, "ffa": Ffa, "alternating": partial(Alternating, gauge=False)}
WEIGHTS = (800.0, 100.0, 100.0)
OTHER = {"server_learning_rate": 0.3, "beta_1": 0.6, "beta_2": 0.8, "tau": 0.05}
kinds = pytest.mark.parametrize("kind", KINDS)
inners = pytest.mark.parametrize("inner", INNER)


def built(kind: type[Optimised], inner: str | None = None, **options: Any) -> Optimised:
    return kind(SCHEMA, StrategySettings(inner=inner, **options))


def beginning() -> AdapterState:
    generator = torch.Generator().manual_seed(1)
    return AdapterState(SCHEMA, torch.randn(SCHEMA.numel, generator=generator))


def after_round(strategy: Strategy, number: int, adapter: AdapterState) -> Aggregated:
    """Finish a round of three clinics whose changes depend on its number only."""
    generator = torch.Generator().manual_seed(100 + number)
    part = SCHEMA.part(strategy.sends(number))
    fold = strategy.fold(number, adapter)
    for weight in WEIGHTS:
        change = torch.randn(part.numel, generator=generator) * 0.2
        fold.add(AdapterState(part, change), weight)
    return fold.result()


def after_rounds(strategy: Strategy, numbers: range, adapter: AdapterState) -> AdapterState:
    for number in numbers:
        adapter = after_round(strategy, number, adapter).adapter
    return adapter


class Reference:
    """The formulas for one part; float32 moments, as Flower holds them."""

    def __init__(self, name: str, options: Mapping[str, float]) -> None:
        self.name = name
        momentum = options.get("beta_1", 0.9)
        default = 1 - momentum if name == "fedavgm" else 0.01
        self.rate = options.get("server_learning_rate", default)
        self.beta_1, self.beta_2 = options.get("beta_1", 0.9), options.get("beta_2", 0.99)
        self.tau = options.get("tau", 1e-3)
        self.steps, self.m, self.v = 0, np.float32(0), np.float32(0)

    def step(self, start: NDArray[np.float32], mean: NDArray[np.float32]) -> NDArray[Any]:
        self.steps += 1
        if self.name == "fedavgm":  # arXiv:1909.06335: v <- beta v + dw, w <- w - rate v
            self.m = self.beta_1 * self.m + (start - mean)
            return (start - self.rate * self.m).astype(np.float32)
        delta = mean - start  # arXiv:2003.00295, algorithm 2
        square, beta_1 = delta**2, 0.0 if self.name == "fedadagrad" else self.beta_1
        self.m = beta_1 * self.m + (1 - beta_1) * delta
        rate = self.rate
        if self.name == "fedadagrad":
            self.v = self.v + square
        elif self.name == "fedyogi":
            self.v = self.v - (1 - self.beta_2) * square * np.sign(self.v - square)
        else:
            self.v = self.beta_2 * self.v + (1 - self.beta_2) * square
            exponent = self.steps + 1.0  # Flower's correction of the bias
            rate = rate * np.sqrt(1 - np.float64(self.beta_2) ** exponent)
            rate = rate / (1 - np.float64(self.beta_1) ** exponent)
        return (start + rate * self.m / (np.sqrt(self.v) + self.tau)).astype(np.float32)


@kinds
@pytest.mark.parametrize("inner", ["flora", "fedavgm", "median"])
def test_an_inner_strategy_that_it_cannot_wrap_is_refused(kind: type[Optimised], inner: str):
    with pytest.raises(ConfigError, match=f"{inner!r} cannot stand inside .* fedavg, ffa"):
        built(kind, inner)


@kinds
def test_factors_that_turn_each_round_are_refused(kind: type[Optimised]):
    with pytest.raises(ConfigError, match="reorthonormalize"):
        built(kind, "ffa", reorthonormalize=True)


@kinds
@pytest.mark.parametrize(
    "damage",
    [
        lambda held: held | {"AB.other": torch.zeros(1)},
        lambda held: {name: each for name, each in held.items() if name != "AB.steps"},
        lambda held: held | {"AB.steps": torch.zeros(0, dtype=torch.int64)},
        lambda held: {name: torch.zeros(3) for name in held},
        lambda held: {name.replace("AB", "B"): each for name, each in held.items()},
    ],
    ids=["one-more", "one-less", "no-count", "other-adapter", "other-inner"],
)
def test_moments_that_do_not_fit_are_refused(kind: type[Optimised], damage: Any):
    strategy = built(kind)
    after_round(strategy, 1, beginning())
    with pytest.raises(AdapterError, match="moments that the run holds"):
        built(kind).recall(damage(strategy.memory()))


def test_moments_of_another_optimiser_are_refused():
    adam, momentum = built(FedAdam), built(FedAvgM)
    for strategy, other in ((adam, momentum), (momentum, adam)):
        after_round(strategy, 1, beginning())
        with pytest.raises(AdapterError, match="not those of"):
            other.recall(strategy.memory())


@kinds
@inners
@pytest.mark.parametrize("options", [{}, OTHER], ids=["defaults", "own-settings"])
def test_every_step_is_the_formula_bit_for_bit(
    kind: type[Optimised], inner: str, options: dict[str, float]
):
    strategy = built(kind, inner, **options)
    plain = INNER[inner](SCHEMA, StrategySettings())
    references: dict[Factors, Reference] = {}
    adapter = strategy.start(beginning())
    assert torch.equal(adapter.values, plain.start(beginning()).values)
    for number in range(1, 7):
        factors = plain.trains(number)
        assert (strategy.trains(number), strategy.sends(number)) == (factors, factors)
        part, mean = adapter.part(factors), after_round(plain, number, adapter).adapter
        reference = references.setdefault(factors, Reference(kind.declaration.name, options))
        expected = reference.step(part.values.numpy(), mean.part(factors).values.numpy())
        found = after_round(strategy, number, adapter)
        np.testing.assert_array_equal(found.adapter.part(factors).values.numpy(), expected)
        resting = found.adapter.with_part(part)
        assert torch.equal(resting.values, adapter.values)  # nothing else moved
        assert (found.mixing, found.increment, found.product_error) == (None, None, None)
        adapter = found.adapter


@inners
def test_momentum_zero_and_rate_one_is_the_inner_strategy(inner: str):
    plain = INNER[inner](SCHEMA, StrategySettings())
    strategy = built(FedAvgM, inner, beta_1=0.0, server_learning_rate=1.0)
    expected = after_rounds(plain, range(1, 5), beginning())
    found = after_rounds(strategy, range(1, 5), beginning())
    assert torch.equal(found.values, expected.values)


@kinds
@inners
def test_a_run_that_stops_after_any_round_goes_on_the_same(kind: type[Optimised], inner: str):
    expected = after_rounds(built(kind, inner), range(1, 7), beginning())
    for stop in range(6):
        first = built(kind, inner)
        adapter = after_rounds(first, range(1, stop + 1), beginning())
        kept = {name: tensor.clone() for name, tensor in first.memory().items()}
        second = built(kind, inner)
        second.recall(kept)
        found = after_rounds(second, range(stop + 1, 7), adapter)
        assert torch.equal(found.values, expected.values)


@kinds
@inners
def test_what_must_be_kept_is_named_by_factors(kind: type[Optimised], inner: str):
    strategy = built(kind, inner)
    assert strategy.memory() == {}
    after_rounds(strategy, range(1, 4), beginning())
    memory = strategy.memory()
    steps = {"fedavg": {"AB": 3}, "ffa": {"B": 3}, "alternating": {"B": 2, "A": 1}}[inner]
    counts = {name: int(tensor) for name, tensor in memory.items() if name.endswith(".steps")}
    assert counts == {f"{factors}.steps": count for factors, count in steps.items()}
    for name, tensor in memory.items():
        if not name.endswith(".steps"):
            length = SCHEMA.part(name.split(".")[0]).numel  # pyright: ignore[reportArgumentType]
            assert (tensor.dtype, tuple(tensor.shape)) == (torch.float32, (length,))


@kinds
@inners
def test_a_round_that_is_begun_and_left_changes_no_moment(kind: type[Optimised], inner: str):
    strategy = built(kind, inner)
    adapter = after_rounds(strategy, range(1, 3), beginning())
    before = {name: tensor.clone() for name, tensor in strategy.memory().items()}
    part = SCHEMA.part(strategy.sends(3))
    strategy.fold(3, adapter).add(AdapterState(part, torch.ones(part.numel)), 1.0)
    after = strategy.memory()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@kinds
@inners
def test_a_round_that_is_finished_twice_counts_once(kind: type[Optimised], inner: str):
    expected = after_rounds(built(kind, inner), range(1, 6), beginning())
    strategy, adapter = built(kind, inner), beginning()
    for number in range(1, 6):
        unused = after_round(strategy, number, adapter)
        adapter = after_round(strategy, number, adapter).adapter
        assert torch.equal(unused.adapter.values, adapter.values)
    assert torch.equal(adapter.values, expected.values)


@kinds
def test_the_adapter_it_is_given_stays_as_it_was(kind: type[Optimised]):
    adapter = beginning()
    after_round(built(kind), 1, adapter)
    assert torch.equal(adapter.values, beginning().values)


@kinds
def test_it_works_outside_a_flower_run(kind: type[Optimised], monkeypatch: pytest.MonkeyPatch):
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, None)
    assert after_round(built(kind), 1, beginning()).adapter.values.isfinite().all()
