"""DP-SGD in the training loop: what a unit can change, what is charged, and peers' faults."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedpeft.config import AdapterSettings, TrainingSettings
from fedpeft.data import EncodedExample
from fedpeft.errors import BudgetSpent, DataError, TrainingError
from fedpeft.models import AdaptedModel
from fedpeft.privacy.noise import GaussianNoise
from fedpeft.privacy.sampling import PoissonSampler
from fedpeft.privacy.skellam import round_to_grid
from fedpeft.training import (
    Place,
    PrivateRound,
    PrivateSum,
    StepDone,
    collate,
    private_steps,
    private_sum,
    train,
    units_of,
)
from fedpeft.training.private import PrivateSteps
from fedpeft.training.steps import sequence_losses, summed_loss

LENGTHS = [9, 30, 14, 5, 22, 17, 8, 12]
PLACE = Place("north", 2, 4)
SETTINGS = TrainingSettings(optimizer="sgd", learning_rate=1.0, batch_size=8, local_steps=1)
CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


class Drawn(PoissonSampler):
    """Hands out the samples it is given, or everyone, and the first records of each unit."""

    def __init__(self, *samples: Sequence[int]) -> None:
        super().__init__()
        self._samples = list(samples)

    def sample(self, units: int, rate: float) -> NDArray[np.int64]:
        if rate == 0.5 and units == 63:  # the seed of dropout
            return np.array([3], np.int64)
        return np.array(self._samples.pop(0) if self._samples else range(units), np.int64)

    def choose(self, items: int, most: int) -> NDArray[np.int64]:
        return np.arange(min(items, most), dtype=np.int64)


class Seen:
    """Noise that is none, and keeps the sums that it was to hide."""

    def __init__(self) -> None:
        self.sums: list[torch.Tensor] = []
        self.scales: list[float] = []

    def add_to(self, total: torch.Tensor, scale: float) -> None:
        self.sums.append(total.clone())
        self.scales.append(scale)


def private(**changes: Any) -> PrivateRound:
    values: dict[str, Any] = {
        "unit": "record",
        "clip": 1e9,
        "records_per_patient": 16,
        "charge": lambda step: None,
        "sampler": Drawn(),
        "noise_multiplier": 1.0,
        "noise": Seen(),
    }
    return PrivateRound(**(values | changes))


def step_sum(
    model: AdaptedModel, rows: Sequence[EncodedExample], changes: dict[str, Any], **more: Any
) -> torch.Tensor:
    """Return the sum of one step before its noise; the adapter stays as it is."""
    noise = Seen()
    settings = SETTINGS.model_copy(update=changes)
    access = private(noise=noise, **more)
    PrivateSteps(model, rows, settings, access, model.weights.detach()).compute(1)
    return noise.sums[0]


def of_patients(rows: Sequence[EncodedExample], patients: Sequence[str]) -> list[EncodedExample]:
    return [
        dataclasses.replace(row, patient_id=patient)
        for row, patient in zip(rows, patients, strict=True)
    ]


def gradient_of(
    model: AdaptedModel, rows: Sequence[EncodedExample], loss: Callable[..., torch.Tensor]
) -> torch.Tensor:
    model.gradient.zero_()
    loss(model, collate(rows, CPU)).sum().backward()
    return model.gradient.clone()


@pytest.fixture
def rows(make_rows) -> list[EncodedExample]:
    return make_rows(LENGTHS)


@pytest.fixture
def model(make_model) -> AdaptedModel:
    return make_model(noise=0.1)


# The step


def test_with_no_clip_and_no_noise_it_is_the_mean_over_sequences(model, rows):
    expected = gradient_of(model, rows, sequence_losses) / len(rows)
    train(model, rows, SETTINGS, PLACE, private=private())
    torch.testing.assert_close(model.gradient, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("unit", ["record", "patient"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_micro_batches_change_nothing(model, rows, unit, size: int):
    patients = of_patients(rows, "aabacbad")
    whole = step_sum(model, patients, {}, unit=unit, clip=0.05)
    parts = step_sum(model, patients, {"micro_batch_size": size}, unit=unit, clip=0.05)
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=0)
    assert whole.norm() > 0.05


def test_a_sample_larger_than_the_batch_is_used_whole(model, rows):
    few = step_sum(model, rows, {"batch_size": 3}, sampler=Drawn(range(8)), clip=0.05)
    torch.testing.assert_close(few, step_sum(model, rows, {}, clip=0.05), atol=1e-6, rtol=0)


def test_gradient_checkpointing_changes_nothing(make_model, rows):
    found: list[torch.Tensor] = []
    for checkpointing in (False, True):
        model = make_model(noise=0.1)
        settings = SETTINGS.model_copy(update={"gradient_checkpointing": checkpointing})
        train(model, rows, settings, PLACE, private=private(clip=0.05))
        found.append(model.read().values)
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=0)


@pytest.mark.parametrize("sample", [[2, 5], [0, 1, 2, 3, 4, 5, 6]])
def test_it_is_divided_by_the_expected_batch_and_not_by_the_sample(model, rows, sample):
    settings = SETTINGS.model_copy(update={"batch_size": 4})
    expected = gradient_of(model, [rows[row] for row in sample], sequence_losses) / 4
    train(model, rows, settings, PLACE, private=private(sampler=Drawn(sample)))
    torch.testing.assert_close(model.gradient, expected, atol=1e-6, rtol=1e-5)


def test_an_empty_sample_takes_its_noise_step(model, rows):
    """Peers skip it, and with it the noise that the accountant counted."""
    charged: list[int] = []
    settings = SETTINGS.model_copy(update={"local_steps": 2, "batch_size": 4})
    access = private(
        sampler=Drawn([], []), noise=GaussianNoise.seeded(1), clip=2.0, charge=charged.append
    )
    before = model.read()
    result = train(model, rows, settings, PLACE, private=access)
    moved = model.read().minus(before).values
    other = GaussianNoise.seeded(1)
    expected = torch.zeros(2, model.schema.numel, dtype=torch.float64)
    for step in expected:
        other.add_to(step, 2.0)
    torch.testing.assert_close(moved, -expected.sum(0).float() / 4, atol=1e-5, rtol=0)
    assert charged == [1, 2]
    assert (result.steps, result.loss, result.tokens, result.target_tokens) == (2, 0.0, 0, 0)


def test_the_noise_has_the_promised_size(model, rows):
    noise = Seen()
    train(model, rows, SETTINGS, PLACE, private=private(noise=noise, noise_multiplier=1.5, clip=3))
    assert noise.scales == [4.5]
    assert noise.sums[0].dtype == torch.float64
    train(model, rows, SETTINGS, PLACE, private=private(noise=GaussianNoise(), clip=0.01))
    assert float(model.gradient.std()) == pytest.approx(0.01 / 8, rel=0.1)


def test_the_proximal_term_comes_after_the_noise(model, rows):
    settings = SETTINGS.model_copy(update={"proximal_mu": 0.5, "local_steps": 2})
    noise, start = Seen(), model.read().values
    states: list[torch.Tensor] = []
    train(model, rows, settings, PLACE, lambda _done: states.append(model.read().values),
          private(noise=noise, clip=0.1))  # fmt: skip
    pull = 0.5 * (states[0] - start)
    torch.testing.assert_close(
        model.gradient, (noise.sums[1] / 8).float() + pull, atol=1e-6, rtol=0
    )


def test_clip_norm_has_no_effect(model, rows):
    settings = SETTINGS.model_copy(update={"clip_norm": 1e-9})
    expected = gradient_of(model, rows, sequence_losses) / len(rows)
    train(model, rows, settings, PLACE, private=private())
    torch.testing.assert_close(model.gradient, expected, atol=1e-6, rtol=1e-5)


def test_private_training_lowers_the_loss(make_model, rows):
    settings = TrainingSettings(learning_rate=2e-2, batch_size=8, local_steps=30)
    losses: list[float] = []

    def observe(done: StepDone) -> None:
        losses.append(done.loss)

    access = private(clip=1.0, noise=GaussianNoise.seeded(0), noise_multiplier=0.1)
    result = train(make_model(), rows, settings, PLACE, observe, access)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert result.loss == pytest.approx(sum(losses) / len(losses))
    assert result.tokens == 30 * sum(LENGTHS)


# The charge


def test_the_charge_comes_before_any_data_is_touched(model, rows, monkeypatch):
    events: list[str] = []
    real_logits, drawn = model.target_logits, Drawn()
    train(model, rows, SETTINGS, PLACE, private=private())  # measures separability

    def logits(input_ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        events.append("compute")
        return real_logits(input_ids, targets)

    def sample(units: int, rate: float) -> NDArray[np.int64]:
        events.append("sample" if units == 8 else "dropout")
        return drawn.sample(units, rate)

    sampler = Drawn()
    monkeypatch.setattr(sampler, "sample", sample)
    monkeypatch.setattr(model, "target_logits", logits)
    settings = SETTINGS.model_copy(update={"local_steps": 2})
    access = private(sampler=sampler, charge=lambda step: events.append(f"charge {step}"))
    train(model, rows, settings, PLACE, private=access)
    step = ["sample", "compute"]
    assert events == ["dropout", "charge 1", *step, "charge 2", *step]


def test_a_step_that_cannot_be_paid_does_not_take_place(model, rows):
    noise = Seen()

    def charge(step: int) -> None:
        if step == 2:
            raise BudgetSpent("enough")

    states: list[torch.Tensor] = []
    settings = SETTINGS.model_copy(update={"local_steps": 3})
    with pytest.raises(BudgetSpent, match="enough"):
        train(model, rows, settings, PLACE, lambda _done: states.append(model.read().values),
              private(charge=charge, noise=noise))  # fmt: skip
    assert len(noise.sums) == len(states) == 1
    assert torch.equal(model.read().values, states[0])


# What one unit can change


@pytest.fixture(scope="module")
def shared_model(tiny_model) -> AdaptedModel:
    from fedpeft.models import load_base

    base = load_base(tiny_model, quantization="none", dtype=torch.float32, device=CPU)
    model = AdaptedModel(base, AdapterSettings(rank=2))
    torch.nn.init.normal_(model.weights, std=0.1, generator=torch.Generator().manual_seed(1))
    return model


few_examples = hypothesis_settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
lengths = st.lists(st.integers(2, 24), min_size=1, max_size=5)


@few_examples
@given(st.lists(lengths, min_size=2, max_size=3), st.floats(1e-3, 10.0), st.integers(0, 9))
def test_all_data_of_a_patient_changes_a_step_by_at_most_the_clip(
    shared_model, make_rows, patients, clip, seed
):
    rows = [
        dataclasses.replace(row, patient_id=str(number))
        for number, records in enumerate(patients)
        for row in make_rows(records, seed=seed + number)
    ]
    without = [row for row in rows if row.patient_id != str(len(patients) - 1)]
    sums = [
        step_sum(shared_model, data, {"batch_size": 4}, unit="patient", clip=clip)
        for data in (rows, without)
    ]
    # Of the others, only rounding in float32 may differ, as rows are padded otherwise.
    assert float((sums[0] - sums[1]).norm()) <= clip * (1 + 1e-5)


@few_examples
@given(st.lists(st.integers(2, 40), min_size=1, max_size=8), st.integers(2, 40), st.integers(0, 9))
def test_of_neighbouring_data_sets_the_sums_differ_by_at_most_the_clip(
    shared_model, make_rows, others, one_more, seed
):
    rows = make_rows([*others, one_more], seed=seed)
    for clip in (0.01, 1.0):
        sums = [
            step_sum(shared_model, data, {"batch_size": 9}, clip=clip) for data in (rows, rows[:-1])
        ]
        assert float((sums[0] - sums[1]).norm()) <= clip * (1 + 1e-5)


def test_the_bound_is_reached(model, rows):
    """Else the tests above would show nothing."""
    change = step_sum(model, rows, {}, clip=0.01) - step_sum(model, rows[:-1], {}, clip=0.01)
    assert float(change.norm()) == pytest.approx(0.01, rel=1e-4)


def test_a_patients_records_are_summed_before_the_clip(model, rows):
    patients = of_patients(rows, "aaaaaaaa")
    expected = gradient_of(model, rows, sequence_losses).double()
    found = step_sum(model, patients, {}, unit="patient", clip=0.1)
    torch.testing.assert_close(found, expected * 0.1 / expected.norm(), atol=1e-6, rtol=0)


def test_of_a_patient_a_step_uses_some_records_drawn_anew(model, rows):
    patients = of_patients(rows, "aaaaaaab")
    sampler = PoissonSampler.seeded(3)
    settings = SETTINGS.model_copy(update={"local_steps": 6})
    noise, read = Seen(), list[int]()
    access = private(unit="patient", records_per_patient=2, sampler=sampler, noise=noise)
    steps = PrivateSteps(model, patients, settings, access, model.weights.detach())
    read = [steps.compute(step).terms for step in range(1, 7)]
    assert read == [3] * 6
    assert len({float(total.norm()) for total in noise.sums}) > 1


def test_a_gradient_that_overflows_counts_as_zero_and_stops_nothing(model, rows, monkeypatch):
    """A stop would tell whoever chose the adapter that the record is here."""
    train(model, rows, SETTINGS, PLACE, private=private())
    real = model.target_logits

    def overflow(input_ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        found = real(input_ids, targets)
        bad = (input_ids == int(rows[3].input_ids[0])).any(dim=1) & (targets.sum(1) == 3)
        return found * torch.where(bad[targets.nonzero()[:, 0]], math.inf, 1.0)[:, None]

    expected = step_sum(model, [*rows[:3], *rows[4:]], {}, clip=0.1)
    monkeypatch.setattr(model, "target_logits", overflow)
    torch.testing.assert_close(step_sum(model, rows, {}, clip=0.1), expected, atol=1e-6, rtol=0)
    result = train(model, rows, SETTINGS, PLACE, private=private())
    assert result.unusable_units == 1
    assert math.isfinite(result.loss)


# Randomness


def weights_after(model: AdaptedModel, rows: Any, sampler: PoissonSampler, noise: Any) -> bytes:
    train(model, rows, SETTINGS, PLACE, private=private(sampler=sampler, noise=noise, clip=0.1))
    return model.read().values.numpy().tobytes()


def test_dropout_is_drawn_from_a_secret_seed(make_model, rows):
    """With a known one, a row more would change the others' gradients beyond the clip."""
    settings = AdapterSettings(rank=4, dropout=0.3)
    sampler = PoissonSampler
    known = [
        weights_after(make_model(settings, noise=0.1), rows, sampler.seeded(1), Seen())
        for _ in range(2)
    ]
    secret = [
        weights_after(make_model(settings, noise=0.1), rows, sampler(), Seen()) for _ in range(2)
    ]
    assert known[0] == known[1]
    assert len({*known, *secret}) == 3


def test_private_training_leaves_the_global_random_state_alone(make_model, rows):
    model = make_model(AdapterSettings(rank=2, dropout=0.3), noise=0.1)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train(model, rows, SETTINGS, PLACE, private=private(sampler=PoissonSampler()))
    assert torch.equal(torch.rand(3), expected)


# Units and steps


def test_units_are_records_or_patients(rows):
    assert units_of(rows[:3], "record") == [[0], [1], [2]]
    assert units_of(of_patients(rows, "babacbad"), "patient") == [[0, 2, 5], [1, 3, 6], [4], [7]]


def test_a_record_without_a_patient_is_refused_by_its_row(rows):
    data = [*of_patients(rows[:2], "ab"), rows[2]]
    with pytest.raises(DataError, match="row 3 names no patient"):
        units_of(data, "patient")


@pytest.mark.parametrize(
    ("units", "changes", "expected"),
    [
        (100, {"batch_size": 8, "local_steps": None}, (13, 0.08)),
        (100, {"batch_size": 8, "local_steps": 5}, (5, 0.08)),
        (3, {"batch_size": 8, "local_steps": None, "local_epochs": 2}, (2, 1.0)),
    ],
)
def test_steps_and_rate_follow_from_the_units(units, changes, expected):
    assert private_steps(units, SETTINGS.model_copy(update=changes)) == expected


def test_steps_are_counted_over_patients_and_not_over_rows(model, rows):
    patients = of_patients(rows, "aabbccdd")
    settings = TrainingSettings(batch_size=2, local_epochs=1)
    charged: list[int] = []
    access = private(unit="patient", charge=charged.append)
    result = train(model, patients, settings, PLACE, private=access)
    assert charged == [1, 2]
    assert result.steps == 2


def test_no_rows_are_refused(model):
    with pytest.raises(TrainingError, match="north has no rows"):
        train(model, [], SETTINGS, PLACE, private=private())


# The sum in whole numbers


def summed(**changes: Any) -> PrivateSum:
    values: dict[str, Any] = {
        "unit": "record",
        "clip": 0.1,
        "records_per_patient": 16,
        "charge": lambda step: None,
        "sampler": Drawn(),
        "grid": 2.0**-12,
        "share": lambda: np.zeros(1, np.int64),
    }
    return PrivateSum(**(values | changes))


@pytest.mark.parametrize("size", [None, 3])
def test_the_sum_rounds_each_units_clipped_gradient(model, rows, size):
    settings = SETTINGS.model_copy(update={"micro_batch_size": size})
    share = np.arange(model.schema.numel, dtype=np.int64)
    before = model.read().values
    found, read = private_sum(model, rows, settings, summed(share=lambda: share))
    each = [step_sum(model, [row], {}, clip=0.1).numpy() for row in rows]
    expected = sum(round_to_grid(one, 2.0**-12) for one in each) + share
    assert found.dtype == np.int64
    # Where padding changed the last bits, a coordinate may fall to the other side.
    assert np.abs(found - expected).max() <= 1
    assert np.mean(found != expected) < 0.01
    assert torch.equal(model.read().values, before)
    assert (read.terms, read.tokens) == (8, sum(LENGTHS))


def test_an_empty_sum_is_the_share_alone_and_is_charged(model, rows):
    charged: list[int] = []
    share = np.arange(model.schema.numel, dtype=np.int64)
    access = summed(sampler=Drawn([]), share=lambda: share, charge=charged.append)
    found, read = private_sum(model, rows, SETTINGS, access)
    assert np.array_equal(found, share)
    assert charged == [1]
    assert (read.loss, read.tokens) == (0.0, 0)


def test_a_sum_that_cannot_be_paid_reads_nothing(model, rows):
    def charge(step: int) -> None:
        raise BudgetSpent(f"step {step}")

    def unexpected() -> NDArray[np.int64]:
        raise AssertionError

    with pytest.raises(BudgetSpent, match="step 1"):
        private_sum(model, rows, SETTINGS, summed(charge=charge, share=unexpected))


# Peers' faults


def test_each_example_is_clipped_and_not_the_mean_of_the_batch(model, rows):
    each = [gradient_of(model, [row], sequence_losses).double() for row in rows]
    clip = 0.5 * min(float(one.norm()) for one in each)
    expected = torch.stack([one * clip / one.norm() for one in each]).sum(0)
    found = step_sum(model, rows, {}, clip=clip)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    mean = torch.stack(each).mean(0)
    assert float((found / len(rows) - mean * clip / mean.norm()).norm()) > 0.1 * clip


def test_the_samples_of_a_round_are_poisson_and_not_a_shuffled_pass(model, rows):
    settings = SETTINGS.model_copy(update={"batch_size": 4, "local_steps": 40})
    access = private(sampler=PoissonSampler.seeded(0))
    steps = PrivateSteps(model, rows[6:] * 4, settings, access, model.weights.detach())
    sizes = [steps.compute(step).terms for step in range(1, 41)]
    assert len(set(sizes)) > 3
    assert np.mean(sizes) == pytest.approx(4, abs=1.5)
    assert steps.count == 40


def test_the_loss_is_not_a_token_mean_over_the_batch(model, rows):
    tokens = sum(int(row.targets.sum()) for row in rows)
    over_tokens = gradient_of(model, rows, summed_loss) / tokens
    over_sequences = gradient_of(model, rows, sequence_losses) / len(rows)
    found = (step_sum(model, rows, {}) / len(rows)).float()
    torch.testing.assert_close(found, over_sequences, atol=1e-6, rtol=1e-5)
    assert float((found - over_tokens).norm()) > 0.1 * float(over_tokens.norm())


def test_accumulation_does_not_move_the_clip(model, rows):
    """Dividing the loss by the accumulation steps would let what is below the clip shrink."""
    norm = float(gradient_of(model, rows[:1], sequence_losses).norm())
    for size in (None, 1):
        changes = {"micro_batch_size": size}
        below = step_sum(model, rows, changes, sampler=Drawn([0]), clip=1.01 * norm)
        assert float(below.norm()) == pytest.approx(norm, rel=1e-5)
        above = step_sum(model, rows, changes, sampler=Drawn([0]), clip=0.9 * norm)
        assert float(above.norm()) == pytest.approx(0.9 * norm, rel=1e-5)
