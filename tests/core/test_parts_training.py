"""Training a part of an adapter: one factor, or the first columns beside a frozen rest."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from fedpeft.adapters import AdapterState, at_rank
from fedpeft.config import AdapterSettings, TrainingSettings
from fedpeft.data import EncodedExample
from fedpeft.errors import AdapterUnchanged, NotSeparable, SchemaMismatch
from fedpeft.models import AdaptedModel, Workbench, load_base
from fedpeft.privacy.noise import GaussianNoise
from fedpeft.privacy.per_unit import UnitGradients
from fedpeft.privacy.sampling import PoissonSampler
from fedpeft.training import (
    Place,
    PrivateRound,
    PrivateSum,
    collate,
    private_sum,
    require_separable,
    separable,
    train,
)
from fedpeft.training.steps import sequence_losses

RANK = 6
FULL = AdapterSettings(rank=RANK, alpha=9.0)
PLACE = Place("north", 1, 3)
SGD = TrainingSettings(optimizer="sgd", learning_rate=0.1, batch_size=4, local_steps=3)
LENGTHS = [9, 30, 14, 5, 22]
CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
FACTORS: Any = pytest.mark.parametrize("factors", ["A", "B"])


@pytest.fixture
def rows(make_rows) -> list[EncodedExample]:
    return make_rows(LENGTHS)


@pytest.fixture
def make_nested(tiny_model):
    """Build a model that trains the first ``rank`` columns of an adapter of rank 6."""

    def make(rank: int, quantization: Any = "none", dropout: float = 0.0) -> AdaptedModel:
        base = load_base(tiny_model, quantization=quantization, dtype=torch.float32, device=CPU)
        settings = at_rank(FULL, rank).model_copy(update={"dropout": dropout})
        model = AdaptedModel(base, settings, rest_rank=RANK - rank)
        generator = torch.Generator().manual_seed(3)
        model.load(
            AdapterState(model.schema, torch.randn(model.schema.numel, generator=generator) * 0.1)
        )
        return model

    return make


def gradient(
    model: AdaptedModel, rows: Sequence[EncodedExample], *, checkpointing: bool = False
) -> AdapterState:
    """Return the gradient of the rows' losses over what ``model`` trains."""
    model.train_mode(gradient_checkpointing=checkpointing)
    model.gradient.zero_()
    sequence_losses(model, collate(rows, CPU)).sum().backward()
    return AdapterState(model.trained, model.gradient.clone())


def by_unit(model: AdaptedModel, rows: Sequence[EncodedExample]) -> torch.Tensor:
    gradients = UnitGradients(model, len(rows))
    batch = collate(rows, CPU)
    with gradients.listening(range(len(rows)), batch.input_ids.shape[1]):
        sequence_losses(model, batch).sum().backward()
    return gradients.slots


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def outside(change: AdapterState, factors: Any, rank: int) -> AdapterState:
    """Return ``change`` with zeros in a part of it."""
    part = change.part(factors, rank)
    return change.with_part(AdapterState(part.schema, torch.zeros(part.schema.numel)))


@torch.no_grad()
def logits(model: AdaptedModel) -> torch.Tensor:
    model.eval_mode()
    tokens = torch.tensor([[5, 9, 200, 31, 7, 64], [300, 4, 4, 17, 90, 1]])
    return model.base.network(input_ids=tokens).logits


def private(**changes: Any) -> PrivateRound:
    values: dict[str, Any] = {
        "unit": "record",
        "clip": 0.5,
        "records_per_patient": 16,
        "charge": lambda step: None,
        "sampler": PoissonSampler(),
        "noise_multiplier": 1.0,
        "noise": GaussianNoise.seeded(1),
    }
    return PrivateRound(**(values | changes))


# What is refused


def test_training_a_alone_from_the_start_changes_nothing_and_is_told(make_model, rows):
    """With B = 0 there is no gradient to A."""
    model = make_model()
    model.focus("A")
    with pytest.raises(AdapterUnchanged):
        train(model, rows, SGD, PLACE)


def test_a_part_alone_is_not_loaded_as_the_whole(make_nested):
    model = make_nested(2)
    before = model.read()
    for part in (before.part("B"), before.part("AB", 2)):
        with pytest.raises(SchemaMismatch):
            model.load(part)
    assert torch.equal(model.read().values, before.values)


# One factor


@FACTORS
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_factors_gradient_is_its_slice_of_the_wholes(
    make_model, rows, factors, checkpointing: bool, quantization
):
    model = make_model(noise=0.1, quantization=quantization)
    expected = gradient(model, rows).part(factors)
    model.focus(factors)
    found = gradient(model, rows, checkpointing=checkpointing)
    assert found.schema == expected.schema == model.trained
    close(found.values, expected.values)
    assert (found.values != 0).float().mean() > 0.9


@FACTORS
def test_only_the_factor_in_focus_is_trained(make_model, rows, factors):
    settings = TrainingSettings(learning_rate=1e-2, weight_decay=0.5, proximal_mu=0.1)
    for private_round in (None, private()):
        model = make_model(noise=0.1)
        before = model.read()
        model.focus(factors)
        train(model, rows, settings, PLACE, private=private_round)
        change = model.read().minus(before)
        assert change.part(factors).values.count_nonzero() == model.trained.numel
        assert outside(change, factors, model.schema.rank).norm() == 0


@FACTORS
def test_training_one_factor_equals_training_both_with_the_others_change_undone(
    make_model, rows, factors
):
    """With SGD and one step, what one factor becomes does not depend on the other's training."""
    one = SGD.model_copy(update={"local_steps": 1, "clip_norm": 1e9})
    both, alone = make_model(noise=0.1), make_model(noise=0.1)
    alone.focus(factors)
    for model in (both, alone):
        train(model, rows, one, PLACE)
    close(alone.read().part(factors).values, both.read().part(factors).values)


def test_a_frozen_factor_needs_no_gradient(make_model):
    model = make_model()
    model.focus("B")
    asked = [name for name, p in model.base.network.named_parameters() if p.requires_grad]
    assert len(asked) == len(model.trained.tensors)
    assert all(".lora_B." in name for name in asked)


def test_changing_the_focus_leaves_the_adapter_as_it_is(make_nested):
    model = make_nested(4)
    before, out = model.read().values, logits(model)
    for factors in ("A", "A", "B", "AB", "B"):
        model.focus(factors)
        assert torch.equal(model.read().values, before)
        assert torch.equal(logits(model), out)
        model.weights.data.neg_()
        changed = model.read().part(factors, 4).values
        assert torch.equal(changed, model.weights.detach())
        model.weights.data.neg_()


def test_the_same_focus_keeps_the_vectors(make_model):
    model = make_model()
    weights = model.weights
    model.focus("AB")
    assert model.weights is weights
    model.focus("B")
    assert model.weights is not weights


# The first columns beside a frozen rest


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("rank", [1, 4])
def test_a_nested_model_computes_what_the_whole_one_does(make_nested, rank: int, quantization):
    nested, whole = make_nested(rank, quantization), make_nested(RANK, quantization)
    assert nested.schema == whole.schema
    assert torch.equal(nested.read().values, whole.read().values)
    close(logits(nested), logits(whole))


@pytest.mark.parametrize("factors", ["A", "B", "AB"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_nested_gradient_is_the_first_columns_of_the_wholes(
    make_nested, rows, factors, checkpointing: bool
):
    nested, whole = make_nested(4), make_nested(RANK)
    nested.focus(factors)
    expected = gradient(whole, rows).part(factors, 4)
    found = gradient(nested, rows, checkpointing=checkpointing)
    assert found.schema == expected.schema
    close(found.values, expected.values)


@pytest.mark.parametrize("factors", ["A", "B", "AB"])
def test_nested_training_changes_only_its_own_columns(make_nested, rows, factors):
    settings = TrainingSettings(learning_rate=1e-2, weight_decay=0.5, local_steps=2)
    for private_round in (None, private()):
        model = make_nested(4)
        before = model.read()
        model.focus(factors)
        train(model, rows, settings, PLACE, private=private_round)
        change = model.read().minus(before)
        assert change.part(factors, 4).values.count_nonzero() == model.trained.numel
        assert outside(change, factors, 4).norm() == 0


def test_the_rest_has_no_dropout(make_nested):
    nested, plain = make_nested(4, dropout=0.5), make_nested(4)
    state = plain.read()
    zeros = AdapterState(state.schema.part("AB", 4), torch.zeros(state.schema.part("AB", 4).numel))
    for model in (nested, plain):
        model.load(state.with_part(zeros))
        model.train_mode(gradient_checkpointing=False)
    tokens = torch.tensor([[5, 9, 200, 31]])
    with torch.no_grad():
        found = [model.base.network(input_ids=tokens).logits for model in (nested, plain)]
    assert torch.equal(found[0], found[1])


def test_the_workbench_takes_a_rest_off_and_puts_it_on(tiny_model):
    bench = Workbench()

    def adapted(rank: int) -> AdaptedModel:
        return bench.adapted(
            tiny_model,
            at_rank(FULL, rank),
            quantization="none",
            dtype="float32",
            rest_rank=RANK - rank,
        )

    state = adapted(RANK).read()
    found: list[torch.Tensor] = []
    for rank in (2, RANK, 5, 2):
        model = adapted(rank)
        model.load(state)
        found.append(logits(model))
        assert adapted(rank) is model
    for other in found[1:]:
        close(other, found[0])


# Under differential privacy


@pytest.mark.parametrize("factors", ["A", "B", "AB"])
@pytest.mark.parametrize("rank", [3, RANK])
def test_each_rows_gradient_of_a_part_is_that_of_the_row_alone(
    make_nested, rows, factors, rank: int
):
    model = make_nested(rank)
    model.focus(factors)
    expected = torch.stack([gradient(model, [row]).values for row in rows])
    model.gradient.zero_()
    for checkpointing in (False, True):
        model.train_mode(gradient_checkpointing=checkpointing)
        close(by_unit(model, rows), expected)
        assert not model.gradient.any()


@FACTORS
def test_noise_falls_on_the_trained_part_alone_and_in_its_size(make_nested, rows, factors):
    model = make_nested(4)
    model.focus(factors)
    before = model.read()
    settings = SGD.model_copy(update={"local_steps": 1, "learning_rate": 1.0})
    train(model, rows, settings, PLACE, private=private(noise_multiplier=200.0))
    change = model.read().minus(before)
    spread = float(change.part(factors, 4).values.std())
    assert spread == pytest.approx(200.0 * 0.5 / 4, rel=0.1)
    assert outside(change, factors, 4).norm() == 0


@FACTORS
def test_a_private_sum_has_the_coordinates_of_the_part(make_nested, rows, factors):
    import numpy as np

    model = make_nested(4)
    model.focus(factors)
    expected = sum(gradient(model, [row]).values.double() for row in rows)
    access = PrivateSum(
        unit="record",
        clip=1e9,
        records_per_patient=16,
        charge=lambda step: None,
        sampler=PoissonSampler(),
        grid=2.0**-20,
        share=lambda: np.zeros(model.trained.numel, np.int64),
    )
    everybody = SGD.model_copy(update={"batch_size": len(rows)})
    found, _ = private_sum(model, rows, everybody, access)
    close(torch.from_numpy(found * 2.0**-20), torch.as_tensor(expected))


@FACTORS
def test_separability_is_measured_for_each_part_once_and_keeps_the_adapter(
    make_nested, monkeypatch: pytest.MonkeyPatch, factors
):
    model = make_nested(4)
    before = model.read().values
    require_separable(model)
    model.focus(factors)
    require_separable(model)
    assert torch.equal(model.read().values, before)
    monkeypatch.setattr(separable, "sequence_losses", None)
    require_separable(model)
    model.focus("AB")
    require_separable(model)
    model.focus("B" if factors == "A" else "A")
    with pytest.raises(TypeError):
        require_separable(model)


def test_a_from_the_start_is_separable_though_it_has_no_gradient(make_model):
    model = make_model()
    model.focus("A")
    require_separable(model)
    assert not model.read().part("B").values.any()


@FACTORS
def test_a_network_that_mixes_rows_is_refused_whatever_is_trained(make_model, factors):
    model = make_model()
    norm = model.base.network.model.layers[0].input_layernorm
    norm.register_forward_hook(lambda _module, _inputs, output: output - output.mean(0))
    model.focus(factors)
    with pytest.raises(NotSeparable, match="depends on the other records"):
        require_separable(model)
