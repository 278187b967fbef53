"""Robust centres: what a few arbitrary clinics can and cannot do, and independent references."""

import gc
import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedpeft.adapters import AdapterSchema, AdapterState, TensorSpec
from fedpeft.config import StrategySettings
from fedpeft.errors import AdapterError, SchemaMismatch
from fedpeft_strategies import multi_krum, robust
from fedpeft_strategies.median import Median
from fedpeft_strategies.multi_krum import MultiKrum, chosen_by_krum
from fedpeft_strategies.norm_bound import NormBound
from fedpeft_strategies.robust import Robust
from fedpeft_strategies.strategy import Aggregated
from fedpeft_strategies.trimmed_mean import TrimmedMean

SCHEMA = AdapterSchema(
    (
        TensorSpec("m.lora_A.weight", (2, 7)),
        TensorSpec("m.lora_B.weight", (5, 2)),
        TensorSpec("n.lora_A.weight", (2, 4)),
        TensorSpec("n.lora_B.weight", (9, 2)),
    ),
    "a" * 64,
)
SIZE = SCHEMA.part("B").numel
KINDS: list[type[Robust]] = [Median, TrimmedMean, MultiKrum, NormBound]
LEAST: dict[type[Robust], Callable[[int], int]] = {
    Median: lambda f: 2 * f + 1,
    TrimmedMean: lambda f: 2 * f + 1,
    MultiKrum: lambda f: 2 * f + 3,
    NormBound: lambda f: 2 * f + 1,
}
ATTACKS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sign-flip": lambda honest: -honest.mean(dim=0),
    "scaled": lambda honest: 1000 * honest[0],
    "scaled-flip": lambda honest: -1000 * honest.mean(dim=0),
    "largest-float": lambda honest: torch.full_like(honest[0], torch.finfo().max),
    "nan": lambda honest: torch.full_like(honest[0], torch.nan),
    "one-infinity": lambda honest: honest[0].index_fill(0, torch.tensor([3]), -torch.inf),
    "copies": lambda honest: honest[0],
    "just-outside": lambda honest: honest.max(dim=0).values + 0.01,
    "noise": lambda honest: 30 * drawn(1, seed=99, size=honest.shape[1])[0],
}
attacks = pytest.mark.parametrize("attack", ATTACKS)
kinds = pytest.mark.parametrize("kind", KINDS)


def drawn(count: int, *, seed: int, size: int = SIZE) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, size, generator=generator) + 0.5


def built(kind: type[Robust], **options: Any) -> Robust:
    return kind(SCHEMA, StrategySettings(**options))


def beginning(strategy: Robust) -> AdapterState:
    """An adapter in the gauge of a first round, with a B that is not zero."""
    return strategy.start(AdapterState(SCHEMA, drawn(1, seed=7, size=SCHEMA.numel)[0]))


def one_round(
    strategy: Robust,
    changes: Sequence[torch.Tensor],
    *,
    number: int = 1,
    weights: Sequence[float] | None = None,
) -> Aggregated:
    fold = strategy.fold(number, beginning(strategy))
    part = SCHEMA.part(strategy.sends(number))
    for change, weight in zip(changes, weights or [1.0] * len(changes), strict=True):
        fold.add(AdapterState(part, change), weight)
    return fold.result()


def moved(strategy: Robust, changes: Sequence[torch.Tensor]) -> torch.Tensor:
    """By how much a first round moved B, read off the products before and after."""
    before = beginning(strategy).tensors()
    after = one_round(strategy, changes).adapter.tensors()
    parts = [
        (
            after[f"{name}.lora_B.weight"].double() @ after[f"{name}.lora_A.weight"].double()
            - before[f"{name}.lora_B.weight"].double() @ before[f"{name}.lora_A.weight"].double()
        )
        @ before[f"{name}.lora_A.weight"].double().T
        for name in ("m", "n")
    ]
    return torch.cat([part.reshape(-1) for part in parts]).float()


def attacked(attack: str, honest: torch.Tensor, count: int) -> list[torch.Tensor]:
    """The honest changes among ``count`` arbitrary ones, which come first and last."""
    wrong = [ATTACKS[attack](honest)] * count
    return [*wrong[: count // 2], *honest, *wrong[count // 2 :]]


@kinds
def test_a_round_without_updates_is_refused(kind: type[Robust]):
    with pytest.raises(AdapterError, match="no update of this round"):
        one_round(built(kind), [])


@kinds
@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_a_round_of_nothing_but_nan_is_refused(kind: type[Robust], max_norm: float | None):
    strategy = built(kind, max_norm=max_norm)
    with pytest.raises(AdapterError, match="3 hold NaN"):
        one_round(strategy, [torch.full((SIZE,), torch.nan)] * 3)


@kinds
@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_a_change_of_a_lower_rank_is_refused(kind: type[Robust], max_norm: float | None):
    strategy = built(kind, max_norm=max_norm)
    fold = strategy.fold(1, beginning(strategy))
    low = SCHEMA.part("B", 1)
    with pytest.raises(SchemaMismatch):
        fold.add(AdapterState(low, torch.ones(low.numel)), 1.0)


@pytest.mark.parametrize("kind", [TrimmedMean, MultiKrum])
@pytest.mark.parametrize("f", [1, 2, 3])
def test_one_clinic_too_few_is_refused_with_the_number_needed(kind: type[Robust], f: int):
    least = LEAST[kind](f)
    with pytest.raises(AdapterError, match=rf"needs {least} clinics .* {least - 1} sent"):
        one_round(built(kind, byzantine=f), list(drawn(least - 1, seed=0)))


@pytest.mark.parametrize("kind", [TrimmedMean, MultiKrum])
def test_more_nan_than_expected_is_refused(kind: type[Robust]):
    changes = attacked("nan", drawn(8, seed=0), 2)
    with pytest.raises(AdapterError, match=r"2 updates .* expect 1"):
        one_round(built(kind, byzantine=1), changes)


@attacks
@pytest.mark.parametrize("kind", [Median, TrimmedMean])
@pytest.mark.parametrize("f", [1, 2, 3])
def test_every_coordinate_stays_between_honest_ones(attack: str, kind: type[Robust], f: int):
    honest = drawn(LEAST[kind](f) - f, seed=f)
    found = moved(built(kind, byzantine=f), attacked(attack, honest, f))
    assert torch.all(found >= honest.min(dim=0).values - 1e-5)
    assert torch.all(found <= honest.max(dim=0).values + 1e-5)


@attacks
def test_the_median_of_an_even_count_tolerates_one_less_than_half(attack: str):
    honest = drawn(4, seed=5)  # and 2 of 6 others
    found = moved(built(Median), attacked(attack, honest, 2))
    assert torch.all(found >= honest.min(dim=0).values - 1e-5)
    assert torch.all(found <= honest.max(dim=0).values + 1e-5)


@pytest.mark.parametrize("kind", [Median, TrimmedMean])
def test_one_more_than_tolerated_leaves_the_honest_range(kind: type[Robust]):
    honest = drawn(3, seed=5)
    found = moved(built(kind, byzantine=2), attacked("scaled", honest, 3))
    outside = (found < honest.min(dim=0).values) | (found > honest.max(dim=0).values)
    assert outside.all()


def diameter(changes: torch.Tensor) -> float:
    return max(float((a - b).norm()) for a, b in itertools.combinations(changes, 2))


@attacks
@pytest.mark.parametrize(("f", "spare"), [(1, 0), (2, 0), (2, 3), (3, 0)])
def test_krum_stays_near_the_honest_mean(attack: str, f: int, spare: int):
    honest = drawn(LEAST[MultiKrum](f) + spare - f, seed=f)
    n = len(honest) + f
    found = moved(built(MultiKrum, byzantine=f), attacked(attack, honest, f))
    reach = diameter(honest) * np.sqrt((n - f - 2) / (n - 2 * f - 1))
    assert float((found - honest.mean(dim=0)).norm()) <= diameter(honest) + reach


@pytest.mark.parametrize("attack", ["scaled", "scaled-flip", "largest-float", "noise"])
@pytest.mark.parametrize("f", [1, 2, 3])
def test_krum_never_chooses_what_is_far_away(attack: str, f: int):
    honest = drawn(LEAST[MultiKrum](f) - f, seed=f)
    changes = attacked(attack, honest, f)
    assert sorted(chosen_by_krum(changes, f)) == [f // 2 + i for i in range(len(honest))]


def test_krum_with_one_more_than_tolerated_leaves_the_honest_ones():
    honest = drawn(3, seed=0)
    found = moved(built(MultiKrum, byzantine=1), attacked("scaled", honest, 2))
    assert float((found - honest.mean(dim=0)).norm()) > 10 * diameter(honest)


def test_krum_tells_near_changes_apart_however_long_they_are():
    honest = 100 + 1e-3 * drawn(5, seed=0)
    near = [honest.mean(dim=0) + 2e-2, honest.mean(dim=0) - 2e-2]
    assert sorted(chosen_by_krum([*near, *honest], 2)) == [2, 3, 4, 5, 6]


def test_krum_tells_changes_apart_whose_squares_no_float32_holds():
    honest = 1e25 * drawn(5, seed=0)
    assert sorted(chosen_by_krum([*(-50 * honest[:2]), *honest], 2)) == [2, 3, 4, 5, 6]


def test_a_bounded_change_keeps_its_direction_however_long_it_is():
    change = 1e30 * drawn(1, seed=0)[0]
    found = moved(built(NormBound, max_norm=2.0), [change])
    torch.testing.assert_close(found, (2 * change.double() / change.double().norm()).float())


@attacks
@pytest.mark.parametrize("max_norm", [None, 2.0])
def test_a_bounded_mean_is_no_longer_than_its_bound(attack: str, max_norm: float | None):
    honest = drawn(4, seed=0)
    bound = max_norm or float(honest.norm(dim=1).max())
    found = moved(built(NormBound, max_norm=max_norm), attacked(attack, honest, 3))
    assert float(found.norm()) <= bound * (1 + 1e-5)


@pytest.mark.parametrize(
    "attack", [name for name in ATTACKS if name not in ("nan", "one-infinity")]
)
def test_the_influence_of_f_clinics_is_bounded(attack: str):
    honest, f, bound = drawn(7, seed=0), 2, 3.0
    strategy = built(NormBound, max_norm=bound)
    wrong = ATTACKS[attack](honest)
    without = moved(strategy, list(honest))
    found = moved(strategy, [*honest[f:], *[wrong] * f])
    assert float((found - without).norm()) <= 2 * f * bound / len(honest) * (1 + 1e-5)


def test_the_median_bound_lies_between_honest_norms():
    honest = drawn(4, seed=0)
    huge = [1e6 * torch.ones(SIZE)] * 3
    found = moved(built(NormBound), [*huge, *honest])
    rest = [change * min(1.0, float(honest.norm(dim=1).max() / change.norm())) for change in honest]
    without = torch.stack(rest).sum(dim=0) / 7
    assert float((found - without).norm()) <= 3 / 7 * float(honest.norm(dim=1).max()) * 2


def test_with_a_fixed_bound_no_update_is_kept():
    strategy = built(NormBound, max_norm=1.0)
    fold = strategy.fold(1, beginning(strategy))
    values = drawn(1, seed=0)[0].clone()
    reference = weakref.ref(values)
    fold.add(AdapterState(SCHEMA.part("B"), values), 1.0)
    del values
    gc.collect()
    assert reference() is None


@kinds
def test_a_clinic_that_sends_nan_changes_nothing(kind: type[Robust]):
    honest = drawn(6, seed=0)
    strategy = built(kind, byzantine=1, max_norm=1.5 if kind is NormBound else None)
    found = moved(strategy, attacked("nan", honest, 1))
    if kind in (TrimmedMean, MultiKrum):  # the one that gave itself away need not be looked for
        torch.testing.assert_close(found, honest.mean(dim=0))
    else:
        torch.testing.assert_close(found, moved(strategy, list(honest)))


@kinds
@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_a_claimed_weight_has_no_influence(kind: type[Robust], max_norm: float | None):
    strategy, changes = built(kind, max_norm=max_norm), list(drawn(5, seed=0))
    plain = one_round(strategy, changes)
    heavy = one_round(strategy, changes, weights=[1e12, 1, 3, 1e-9, 8])
    assert torch.equal(plain.adapter.values, heavy.adapter.values)


@kinds
@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("max_norm", [None, 3.0])
def test_permuting_clinics_changes_nothing(kind: type[Robust], number: int, max_norm: float | None):
    strategy = built(kind, max_norm=max_norm)
    size = SCHEMA.part(strategy.sends(number)).numel
    changes = list(drawn(5, seed=0, size=size))
    straight = one_round(strategy, changes, number=number)
    for order in itertools.islice(itertools.permutations(range(5)), 1, 120, 17):
        found = one_round(strategy, [changes[i] for i in order], number=number)
        torch.testing.assert_close(found.adapter.values, straight.adapter.values)


@kinds
@pytest.mark.parametrize("count", [5, 6])
def test_equal_updates_give_that_update(kind: type[Robust], count: int):
    change = drawn(1, seed=3)[0]
    assert torch.equal(built(kind).centre([change] * count, 0), change)


@kinds
def test_a_long_vector_is_the_same_in_small_blocks(
    kind: type[Robust], monkeypatch: pytest.MonkeyPatch
):
    strategy, changes = built(kind), list(drawn(6, seed=1))
    whole = strategy.centre(changes, 0)
    for module in (robust, multi_krum):
        monkeypatch.setattr(module, "BLOCK", 5)
    torch.testing.assert_close(strategy.centre(changes, 0), whole)


@kinds
def test_a_change_is_as_long_as_that_of_the_product(kind: type[Robust]):
    """What makes the coordinates and distances of different clinics comparable."""
    strategy = built(kind)
    adapter = beginning(strategy)
    for number in range(1, 5):
        part = SCHEMA.part(strategy.sends(number))
        changes = [AdapterState(part, change) for change in drawn(5, seed=9, size=part.numel)]
        products: list[torch.Tensor] = []
        for change in changes:
            own = adapter.with_part(adapter.part(part.factors).plus(change)).tensors()
            pairs = (
                own[f"{n}.lora_B.weight"].double() @ own[f"{n}.lora_A.weight"].double()
                for n in "mn"
            )
            products.append(torch.cat([pair.reshape(-1) for pair in pairs]))
        for (a, x), (b, y) in itertools.combinations(zip(changes, products, strict=True), 2):
            assert float((x - y).norm()) == pytest.approx(a.minus(b).norm(), rel=1e-5)
        fold = strategy.fold(number, adapter)
        for change in changes:
            fold.add(change, 1.0)
        adapter = fold.result().adapter


@kinds
@pytest.mark.parametrize("number", [1, 2])
def test_the_resting_factor_follows_from_the_mixing(kind: type[Robust], number: int):
    strategy = built(kind)
    size = SCHEMA.part(strategy.sends(number)).numel
    found = one_round(strategy, list(drawn(5, seed=0, size=size)), number=number)
    assert found.mixing is not None
    assert found.mixing.factor not in strategy.sends(number)
    mixed = found.mixing.applied(beginning(strategy)).part(found.mixing.factor)
    assert torch.equal(mixed.values, found.adapter.part(found.mixing.factor).values)


def krum_by_the_paper(changes: NDArray[np.float64], f: int) -> set[int]:
    """Section 4 and 'Multi-Krum' of arXiv:1703.02757, with loops."""
    n = len(changes)
    scores: list[tuple[float, int]] = []
    for i in range(n):
        others = sorted(
            sum((float(a) - float(b)) ** 2 for a, b in zip(changes[i], changes[j], strict=True))
            for j in range(n)
            if j != i
        )
        scores.append((sum(others[: n - f - 2]), i))
    return {i for _, i in sorted(scores)[: n - f]}


@st.composite
def rounds(draw: st.DrawFn, least: Callable[[int], int]) -> tuple[NDArray[np.float32], int]:
    """Changes of a few clinics, some of them wild, and the count f."""
    f = draw(st.integers(1, 3))
    n = least(f) + draw(st.integers(0, 4))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    scales = draw(st.lists(st.sampled_from([1e-3, 1.0, 1.0, 1.0, 1e3]), min_size=n, max_size=n))
    changes = generator.normal(size=(n, draw(st.integers(1, 12)))) * np.array(scales)[:, None]
    return changes.astype(np.float32), f


def centre(kind: type[Robust], changes: NDArray[np.float32], f: int = 1) -> NDArray[np.float32]:
    vectors = [torch.from_numpy(change) for change in changes]
    return built(kind, byzantine=f).centre(vectors, 0).numpy()


@settings(deadline=None)
@given(case=rounds(lambda _: 1))
def test_the_median_is_numpys(case: tuple[NDArray[np.float32], int]):
    expected = np.median(case[0].astype(np.float64), axis=0)
    np.testing.assert_allclose(centre(Median, case[0]), expected, rtol=1e-6)


@settings(deadline=None)
@given(case=rounds(lambda f: 2 * f + 1))
def test_the_trimmed_mean_drops_f_at_each_end(case: tuple[NDArray[np.float32], int]):
    changes, f = case
    kept = [sorted(column.tolist())[f : len(column) - f] for column in changes.T]
    expected = [sum(values) / len(values) for values in kept]
    np.testing.assert_allclose(centre(TrimmedMean, changes, f), expected, rtol=1e-6, atol=1e-12)


@settings(deadline=None)
@given(case=rounds(lambda f: 2 * f + 3))
def test_krum_is_the_papers(case: tuple[NDArray[np.float32], int]):
    changes, f = case
    chosen = krum_by_the_paper(changes.astype(np.float64), f)
    assert set(chosen_by_krum([torch.from_numpy(change) for change in changes], f)) == chosen
    expected = changes.astype(np.float64)[sorted(chosen)].mean(axis=0)
    np.testing.assert_allclose(centre(MultiKrum, changes, f), expected, rtol=1e-5, atol=1e-9)


@settings(deadline=None)
@given(case=rounds(lambda f: 2 * f + 1), fixed=st.booleans())
def test_bounded_changes_are_numpys(case: tuple[NDArray[np.float32], int], fixed: bool):
    changes = np.resize(case[0], (len(case[0]), SIZE))
    norms = np.sqrt((changes.astype(np.float64) ** 2).sum(axis=1))
    bound = 2.0 if fixed else float(np.median(norms))
    expected = (changes * np.minimum(1, bound / norms)[:, None]).mean(axis=0)
    strategy = built(NormBound, max_norm=bound if fixed else None)
    found = moved(strategy, [torch.from_numpy(change) for change in changes])
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-5 * (1 + bound))
