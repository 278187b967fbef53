"""The training loop against an independent one: plain PEFT, per-tensor gradients, HF's loss."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from fedpeft.adapters import AdapterState
from fedpeft.config import AdapterSettings, TrainingSettings
from fedpeft.data import EncodedExample
from fedpeft.errors import AdapterUnchanged, NotFinite, TrainingError
from fedpeft.models import AdaptedModel
from fedpeft.training import Place, StepDone, collate, learning_rate, plan_round, train

LENGTHS = [9, 30, 14, 5, 22, 17, 40, 3, 12, 26, 8]
PLACE = Place("north", 2, 4)
LORA = AdapterSettings(rank=4, alpha=8.0)
SETTINGS = TrainingSettings(
    learning_rate=5e-3, batch_size=4, local_steps=5, clip_norm=0.5, weight_decay=0.1
)
CPU = torch.device("cpu")
# peft 0.21 reads an attribute that transformers 5.23 calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here")


def hf_batch(rows: Sequence[EncodedExample]) -> dict[str, torch.Tensor]:
    """Pad as Hugging Face's trainers do: an attention mask, and -100 where no loss is wanted."""
    longest = max(len(row) for row in rows)
    ids = torch.zeros((len(rows), longest), dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for at, row in enumerate(rows):
        for position, (token, target) in enumerate(zip(row.input_ids, row.targets, strict=True)):
            ids[at, position], mask[at, position] = int(token), 1
            labels[at, position] = int(token) if target else -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def reference(
    directory: Path,
    start: AdapterState,
    rows: Sequence[EncodedExample],
    settings: TrainingSettings,
    place: Place = PLACE,
) -> tuple[torch.Tensor, list[float]]:
    """Train plain PEFT from ``start``; return the adapter, flat, and the loss of each step."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    base = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model: Any = get_peft_model(base, config)
    named = {
        name.replace(".default", ""): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    for name, tensor in start.tensors().items():
        named[name].data.copy_(tensor)
    before = {name: parameter.detach().clone() for name, parameter in named.items()}
    optimizer = torch.optim.AdamW(
        named.values(), lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    plan, losses = plan_round([len(row) for row in rows], settings, place), []
    for number, batch in enumerate(plan.batches):
        optimizer.zero_grad()
        loss = model(**hf_batch([rows[row] for row in batch])).loss
        losses.append(float(loss.detach()))
        distance = sum((named[n] - before[n]).square().sum() for n in named)
        (loss + settings.proximal_mu / 2 * distance).backward()
        torch.nn.utils.clip_grad_norm_(named.values(), settings.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, plan.first_step + number, plan.total_steps)
        optimizer.step()
    flat = [named[spec.name].detach().reshape(-1) for spec in start.schema.tensors]
    return torch.cat(flat), losses


@pytest.fixture
def rows(make_rows) -> list[EncodedExample]:
    return make_rows(LENGTHS)


# What stops training


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_with_step_and_rows(make_model, rows, bad: float):
    model = make_model(noise=0.1)
    for parameter in model.base.network.model.norm.parameters():
        parameter.data.fill_(bad)
    before = model.read().values
    with pytest.raises(NotFinite) as caught:
        train(model, rows, SETTINGS, PLACE)
    first = plan_round(LENGTHS, SETTINGS, PLACE).batches[0]
    numbers = ", ".join(str(rows[row].row) for row in first)
    assert f"at step 1 of round 2 (rows {numbers})" in str(caught.value)
    assert torch.equal(model.read().values, before)


def test_a_gradient_that_overflows_stops_before_the_adapter_is_touched(make_model, rows):
    model = make_model(noise=0.1)
    events: list[StepDone] = []

    def poison(done: StepDone) -> None:
        events.append(done)
        model.weights.data.fill_(math.nan)

    with pytest.raises(NotFinite, match="at step 2 of round 2"):
        train(model, rows, SETTINGS, PLACE, poison)
    assert len(events) == 1


def test_no_rows_are_refused(make_model):
    with pytest.raises(TrainingError, match="north has no rows"):
        train(make_model(), [], SETTINGS, PLACE)


def test_a_rate_too_small_to_change_anything_is_told(make_model, rows):
    settings = SETTINGS.model_copy(update={"learning_rate": 1e-60})
    with pytest.raises(AdapterUnchanged, match=r"trained 5 steps in round 2 .* did not change"):
        train(make_model(noise=0.1), rows, settings, PLACE)


def test_training_without_a_gradient_is_told(make_model, rows, monkeypatch):
    model = make_model()

    def constant(input_ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return torch.zeros(int(targets.sum()), 320, requires_grad=True)

    monkeypatch.setattr(model, "target_logits", constant)
    with pytest.raises(AdapterUnchanged):
        train(model, rows, SETTINGS.model_copy(update={"weight_decay": 0.0}), PLACE)


def test_the_8_bit_optimiser_is_refused_on_the_cpu(make_model, rows):
    settings = SETTINGS.model_copy(update={"optimizer": "adamw-8bit-paged"})
    with pytest.raises(TrainingError, match=r'needs a CUDA device .* use "adamw"'):
        train(make_model(), rows, settings, PLACE)


# The same as the independent loop


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"clip_norm": 1e9},
        {"micro_batch_size": 1},
        {"micro_batch_size": 3},
        {"gradient_checkpointing": True},
        {"proximal_mu": 5.0},
        {"schedule": "cosine", "warmup_steps": 7},
        {"bucket_by_length": False, "batch_size": 11},
    ],
    ids=str,
)
def test_the_loop_equals_the_independent_one(make_model, tiny_model, rows, changes):
    settings = SETTINGS.model_copy(update=changes)
    model = make_model(LORA, noise=0.1)
    start = model.read()
    expected, losses = reference(tiny_model, start, rows, settings)
    events: list[StepDone] = []
    result = train(model, rows, settings, PLACE, events.append)
    torch.testing.assert_close(model.read().values, expected, atol=1e-5, rtol=0)
    assert [done.loss for done in events] == pytest.approx(losses, abs=1e-5)
    assert (expected - start.values).abs().max() > 1e-3
    weights = [
        sum(int(rows[row].targets.sum()) for row in batch)
        for batch in plan_round(LENGTHS, settings, PLACE).batches
    ]
    mean = sum(w * loss for w, loss in zip(weights, losses, strict=True)) / sum(weights)
    assert result.loss == pytest.approx(mean, abs=1e-5)
    assert result.target_tokens == sum(weights)
    assert result.steps == len(events) == 5


def test_the_proximal_term_holds_the_adapter_back(make_model, rows):
    moved: list[float] = []
    for mu in (0.0, 100.0):
        model = make_model(noise=0.1)
        start = model.read()
        train(model, rows, SETTINGS.model_copy(update={"proximal_mu": mu}), PLACE)
        moved.append(model.read().minus(start).norm())
    assert moved[1] < 0.9 * moved[0]


def test_training_lowers_the_loss(make_model, rows):
    model, losses = make_model(), []
    settings = SETTINGS.model_copy(update={"local_steps": 40, "learning_rate": 2e-2})
    train(model, rows, settings, PLACE, lambda done: losses.append(done.loss))
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])


# A function of seeds


def trained(model: AdaptedModel, rows, settings: TrainingSettings, *places: Place) -> bytes:
    for place in places:
        train(model, rows, settings, place)
    return model.read().values.numpy().tobytes()


DROPOUT = AdapterSettings(rank=2, dropout=0.3)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_the_same_seed_gives_the_same_bytes(make_model, rows, quantization):
    torch.manual_seed(1)
    one = trained(make_model(DROPOUT, quantization=quantization), rows, SETTINGS, PLACE)
    torch.manual_seed(2)
    two = trained(make_model(DROPOUT, quantization=quantization), rows, SETTINGS, PLACE)
    assert one == two


@pytest.mark.parametrize("bucket", [True, False])
def test_another_seed_gives_other_bytes(make_model, rows, bucket: bool):
    settings = SETTINGS.model_copy(update={"bucket_by_length": bucket})
    one = trained(make_model(), rows, settings, PLACE)
    two = trained(make_model(), rows, settings.model_copy(update={"seed": 1}), PLACE)
    assert one != two


def test_dropout_alone_depends_on_seed_and_round(make_model, rows):
    settings = SETTINGS.model_copy(update={"local_steps": 1})
    places = [Place("north", number, 9) for number in (1, 2, 3)]
    # One row alone, so that the order of rows cannot make the difference.
    for lora, distinct in ((LORA, 1), (DROPOUT, 3)):
        found = {trained(make_model(lora), rows[:1], settings, place) for place in places}
        assert len(found) == distinct
    other = settings.model_copy(update={"seed": 1})
    assert trained(make_model(DROPOUT), rows[:1], other, places[0]) not in found


def test_a_clinic_that_restarts_draws_what_it_would_have_drawn(make_model, rows):
    places = [Place("north", number, 3) for number in (1, 2, 3)]
    through = make_model(DROPOUT)
    expected = trained(through, rows, SETTINGS, *places)
    state = make_model(DROPOUT).read()
    for place in places:
        fresh = make_model(DROPOUT)
        fresh.load(state)
        train(fresh, rows, SETTINGS, place)
        state = fresh.read()
    assert state.values.numpy().tobytes() == expected


def test_training_leaves_the_global_random_state_alone(make_model, rows):
    model = make_model(DROPOUT)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train(model, rows, SETTINGS, PLACE)
    assert torch.equal(torch.rand(3), expected)


# What training touches


def frozen(model: AdaptedModel) -> dict[str, torch.Tensor]:
    tensors = [*model.base.network.named_parameters(), *model.base.network.named_buffers()]
    return {name: t.detach().clone() for name, t in tensors if "lora_" not in name}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_only_the_adapter_changes(make_model, rows, quantization, checkpointing: bool):
    model = make_model(quantization=quantization)
    before, start = frozen(model), model.read()
    settings = SETTINGS.model_copy(
        update={"gradient_checkpointing": checkpointing, "local_steps": 2}
    )
    train(model, rows, settings, PLACE)
    after = frozen(model)
    assert len(before) > 10
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert model.read().minus(start).norm() > 0


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_computing_in_bfloat16_trains_a_single_precision_adapter(make_model, rows, quantization):
    model = make_model(quantization=quantization, dtype=torch.bfloat16)
    result = train(model, rows, SETTINGS, PLACE)
    assert model.read().values.dtype == torch.float32
    assert math.isfinite(result.loss)


def test_tokens_are_counted_without_padding(make_model, rows):
    settings = TrainingSettings(batch_size=4, local_epochs=2)
    result = train(make_model(), rows, settings, PLACE)
    assert result.tokens == 2 * sum(LENGTHS)
    assert result.target_tokens == 2 * sum(int(row.targets.sum()) for row in rows)


def test_collating_pads_with_what_is_no_target(make_rows):
    rows = make_rows([3, 5])
    rows[1].targets[0] = True
    batch = collate(rows, CPU)
    assert batch.input_ids.tolist() == [[*rows[0].input_ids, 0, 0], [*rows[1].input_ids]]
    assert batch.targets.tolist()[0] == [False, True, True, False, False]
    assert not batch.targets[:, 0].any()
    expected = [int(t) for row in rows for t in row.input_ids[1:][row.targets[1:]]]
    assert batch.labels.tolist() == expected


# With a GPU


@needs_cuda
@pytest.mark.parametrize("optimizer", ["adamw", "adamw-8bit-paged"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_nf4_trains_on_cuda(make_model, rows, optimizer, checkpointing: bool):
    model = make_model(quantization="nf4", dtype=torch.bfloat16, device="cuda", noise=0.1)
    before, start = frozen(model), model.read()
    settings = SETTINGS.model_copy(
        update={"optimizer": optimizer, "gradient_checkpointing": checkpointing}
    )
    train(model, rows, settings, PLACE)
    assert all(torch.equal(tensor, frozen(model)[name]) for name, tensor in before.items())
    assert model.read().minus(start).norm() > 0


@needs_cuda
def test_single_precision_on_cuda_is_as_on_the_cpu(make_model, rows):
    there, here = make_model(device="cuda", noise=0.1), make_model(noise=0.1)
    for model in (there, here):
        train(model, rows, SETTINGS, PLACE)
    torch.testing.assert_close(there.read().values, here.read().values, atol=1e-3, rtol=0)
