"""Made-up rounds for the tests of strategies: adapters, clinics' changes and weights."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from fedpeft.adapters import AdapterSchema, AdapterState, Factors, TensorSpec
from fedpeft.config import StrategySettings
from fedpeft_strategies import STRATEGIES, Aggregated, Strategy
from tests.strategies.reference import Matrix, Pair, product

EXACT = 1e-5
"""What float32 may leave of an exact figure, relative to the products that go into it."""


def schema(widths: Sequence[tuple[int, int]], rank: int, fingerprint: str = "a") -> AdapterSchema:
    """Modules of the given (outputs, inputs)."""
    tensors: list[TensorSpec] = []
    for index, (outputs, inputs) in enumerate(widths):
        tensors.append(TensorSpec(f"m{index}.lora_A.weight", (rank, inputs)))
        tensors.append(TensorSpec(f"m{index}.lora_B.weight", (outputs, rank)))
    return AdapterSchema(tuple(tensors), fingerprint * 64)


def drawn(of: AdapterSchema, seed: int) -> AdapterState:
    generator = torch.Generator().manual_seed(seed)
    return AdapterState(of, torch.randn(of.numel, generator=generator))


def dense(state: AdapterState) -> dict[str, Pair]:
    """The pairs (B, A) by module; a factor that is missing is zero, as in a change of the other."""
    tensors = {name: tensor.double().numpy() for name, tensor in state.tensors().items()}
    result: dict[str, Pair] = {}
    for index in range(len(tensors)):
        a, b = (tensors.get(f"m{index}.lora_{factor}.weight") for factor in "AB")
        if a is not None and b is not None:
            result[f"m{index}"] = (b, a)
    return result


def dense_changes(world: "World", changes: Sequence[AdapterState]) -> list[dict[str, Pair]]:
    return [dense(whole(change, world.schema)) for change in changes]


def whole(change: AdapterState, of: AdapterSchema) -> AdapterState:
    """A change of one factor as a change of both."""
    rank = change.schema.rank
    nothing = AdapterState(of.part("AB", rank), torch.zeros(of.part("AB", rank).numel))
    return nothing.with_part(change)


@dataclass(frozen=True)
class World:
    """One round: the adapter that it starts from, and each clinic's rank and weight."""

    adapter: AdapterState
    ranks: tuple[int, ...]
    weights: tuple[int, ...]
    seed: int

    @property
    def schema(self) -> AdapterSchema:
        return self.adapter.schema

    def changes(self, factors: Factors, number: int = 0) -> list[AdapterState]:
        return [
            drawn(self.schema.part(factors, rank), self.seed + 1000 * number + index + 1)
            for index, rank in enumerate(self.ranks)
        ]


@st.composite
def worlds(draw: st.DrawFn, *, mixed: bool = False, least: int = 1, most: int = 5) -> World:
    """Up to three modules of unequal widths, and ``least`` to ``most`` clinics."""
    width = st.integers(1, 9)
    widths = draw(st.lists(st.tuples(width, width), min_size=1, max_size=3))
    rank, count, seed = (
        draw(st.integers(1, 4)),
        draw(st.integers(least, most)),
        draw(st.integers(0, 10**6)),
    )
    own = st.integers(1, rank) if mixed else st.just(rank)
    ranks = draw(st.lists(own, min_size=count, max_size=count))
    weights = draw(st.lists(st.integers(1, 10**4), min_size=count, max_size=count))
    return World(drawn(schema(widths, rank), seed), tuple(ranks), tuple(weights), seed)


def unequal(ranks: tuple[int, ...] = (8, 8, 8), seed: int = 0) -> World:
    """Three clinics of weights 8:1:1 over two modules that are wider one way than the other."""
    adapter = drawn(schema([(12, 20), (17, 9)], 8), seed)
    return World(adapter, ranks, (800, 100, 100), seed)


def strategy_of(name: str, of: AdapterSchema, **settings: object) -> Strategy:
    return STRATEGIES[name](of, StrategySettings.model_validate({"name": name, **settings}))


def aggregated(
    strategy: Strategy,
    adapter: AdapterState,
    changes: Sequence[AdapterState],
    weights: Sequence[float],
    number: int = 1,
) -> Aggregated:
    fold = strategy.fold(number, adapter)
    for change, weight in zip(changes, weights, strict=True):
        fold.add(change, weight)
    return fold.result()


def served(result: Aggregated) -> dict[str, Matrix]:
    """The product that a base model has from a round: the adapter's and what went into the base."""
    found = product(dense(result.adapter))
    if result.increment is not None:
        for module, matrix in product(dense(result.increment)).items():
            found[module] = found[module] + matrix
    return found


def turned(adapter: AdapterState, change: AdapterState) -> AdapterState:
    """The change of a clinic that has the same product from B·M and M⁻¹·A."""
    own = adapter.plus(change)
    mixing = torch.randn(
        own.schema.rank, own.schema.rank, generator=torch.Generator().manual_seed(7)
    )
    mixing = (mixing + 3 * torch.eye(own.schema.rank)).double()
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in own.tensors().items():
        wide = tensor.double()
        tensors[name] = torch.linalg.solve(mixing, wide) if "lora_A" in name else wide @ mixing
    return AdapterState.from_tensors(tensors, own.schema).minus(adapter)
