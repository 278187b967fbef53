"""The plan of batches and learning rates: a function of seeds, over the whole run."""

import dataclasses
import math
from collections import Counter
from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.config import TrainingSettings
from fedpeft.training import Place, learning_rate, plan_round, round_steps
from fedpeft.training.batches import derived_seed

NORTH = Place("north", 1, 10)


def lengths(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(2, 400, count).tolist()


def whole_run(
    rows: list[int], settings: TrainingSettings, rounds: int, clinic: str = "north"
) -> list[tuple[int, ...]]:
    plans = [plan_round(rows, settings, Place(clinic, n, rounds)) for n in range(1, rounds + 1)]
    return list(chain.from_iterable(plan.batches for plan in plans))


def padding(rows: list[int], batches: list[tuple[int, ...]]) -> int:
    return sum(len(batch) * max(rows[row] for row in batch) for batch in batches) - sum(rows)


@given(
    count=st.integers(1, 60),
    size=st.integers(1, 9),
    epochs=st.integers(1, 3),
    bucket=st.booleans(),
    seed=st.integers(0, 99),
)
def test_every_epoch_passes_over_every_row_once(
    count: int, size: int, epochs: int, bucket: bool, seed: int
):
    settings = TrainingSettings(
        batch_size=size, local_epochs=epochs, bucket_by_length=bucket, seed=seed
    )
    batches = plan_round(lengths(count), settings, NORTH).batches
    assert Counter(chain.from_iterable(batches)) == dict.fromkeys(range(count), epochs)
    per_epoch = math.ceil(count / size)
    assert len(batches) == per_epoch * epochs
    first = Counter(chain.from_iterable(batches[:per_epoch]))
    assert first == dict.fromkeys(range(count), 1)
    assert max(map(len, batches)) <= size


@given(count=st.integers(1, 40), size=st.integers(1, 9), steps=st.integers(1, 12))
def test_rounds_of_few_steps_pass_over_the_rows_together(count: int, size: int, steps: int):
    settings = TrainingSettings(batch_size=size, local_steps=steps)
    per_epoch = math.ceil(count / size)
    run = whole_run(lengths(count), settings, rounds=4)
    assert len(run) == 4 * steps
    for start in range(0, len(run) - per_epoch + 1, per_epoch):
        epoch = Counter(chain.from_iterable(run[start : start + per_epoch]))
        assert epoch == dict.fromkeys(range(count), 1)


def test_a_round_is_the_same_whether_or_not_the_rounds_before_were_planned():
    settings = TrainingSettings(batch_size=4, local_steps=3)
    rows = lengths(30)
    run = whole_run(rows, settings, rounds=10)
    seventh = plan_round(rows, settings, Place("north", 7, 10))
    assert list(seventh.batches) == run[18:21]
    assert (seventh.first_step, seventh.total_steps) == (18, 30)


@pytest.mark.parametrize("bucket", [True, False])
def test_epochs_seeds_and_clinics_are_ordered_differently(bucket: bool):
    settings = TrainingSettings(batch_size=4, bucket_by_length=bucket)
    rows = lengths(40)
    first, second = whole_run(rows, settings, 2)[:10], whole_run(rows, settings, 2)[10:]
    other_seed = whole_run(rows, settings.model_copy(update={"seed": 1}), 1)
    other_clinic = whole_run(rows, settings, 1, clinic="south")
    assert len({tuple(order) for order in (first, second, other_seed, other_clinic)}) == 4


def test_bucketing_saves_most_of_the_padding_and_still_mixes():
    rows = lengths(800)
    settings = TrainingSettings(batch_size=8)
    bucketed = list(plan_round(rows, settings, NORTH).batches)
    plain = settings.model_copy(update={"bucket_by_length": False})
    assert padding(rows, bucketed) < 0.2 * padding(
        rows, list(plan_round(rows, plain, NORTH).batches)
    )
    longest = [max(rows[row] for row in batch) for batch in bucketed]
    assert longest != sorted(longest)
    assert longest != sorted(longest, reverse=True)


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        (TrainingSettings(batch_size=4), 3),
        (TrainingSettings(batch_size=4, local_epochs=2), 6),
        (TrainingSettings(batch_size=4, local_steps=5), 5),
        (TrainingSettings(batch_size=100), 1),
    ],
)
def test_the_steps_of_a_round_are_known_before(settings: TrainingSettings, steps: int):
    assert round_steps(10, settings) == steps
    assert len(plan_round(lengths(10), settings, NORTH).batches) == steps


def test_a_seed_depends_on_every_part_and_fits_torch():
    seeds = [derived_seed(*parts) for parts in ((0, "a", 1), (1, "a", 1), (0, "a", 2), (0, "a1"))]
    assert len(set(seeds)) == 4
    assert all(0 <= seed < 2**63 for seed in seeds)


# The learning rate


def rates(settings: TrainingSettings, total: int) -> list[float]:
    return [learning_rate(settings, step, total) for step in range(total)]


def test_constant_is_constant():
    assert rates(TrainingSettings(learning_rate=0.5), 4) == [0.5] * 4


def test_warm_up_is_linear_and_reaches_the_rate():
    found = rates(TrainingSettings(learning_rate=0.5, warmup_steps=5), 7)
    assert found == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.5, 0.5])


def test_cosine_follows_the_formula_and_ends_near_nothing():
    settings = TrainingSettings(learning_rate=2.0, schedule="cosine", warmup_steps=10)
    found = rates(settings, 110)
    expected = [2.0 * (1 + math.cos(math.pi * k / 100)) / 2 for k in range(100)]
    assert found[10:] == pytest.approx(expected)
    assert found[10] == 2.0
    assert found[60] == pytest.approx(1.0)
    assert 0 <= found[-1] < 1e-3
    assert found[10:] == sorted(found[10:], reverse=True)


@pytest.mark.parametrize("step", [20, 1000])
def test_cosine_stays_at_nothing_after_its_end(step: int):
    settings = TrainingSettings(schedule="cosine")
    assert learning_rate(settings, step, 20) == 0


def test_a_warm_up_longer_than_the_run_never_passes_the_rate():
    settings = TrainingSettings(learning_rate=1.0, schedule="cosine", warmup_steps=100)
    assert rates(settings, 10) == pytest.approx([(k + 1) / 100 for k in range(10)])


def test_the_schedule_spans_the_rounds():
    settings = TrainingSettings(batch_size=4, local_steps=5, schedule="cosine", learning_rate=1.0)
    plans = [
        plan_round(lengths(20), settings, dataclasses.replace(NORTH, round=n)) for n in (1, 2, 10)
    ]
    starts = [learning_rate(settings, plan.first_step, plan.total_steps) for plan in plans]
    assert starts == pytest.approx([(1 + math.cos(math.pi * k / 50)) / 2 for k in (0, 5, 45)])
