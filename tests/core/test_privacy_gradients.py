"""Gradients by unit: against Opacus and plain autograd, their clip, and what is refused."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.config import AdapterSettings
from fedpeft.data import EncodedExample
from fedpeft.errors import NotFinite, NotSeparable
from fedpeft.models import AdaptedModel, load_base
from fedpeft.privacy.clipping import clipped
from fedpeft.privacy.per_unit import UnitGradients
from fedpeft.training import collate, require_separable, separable
from fedpeft.training.steps import sequence_losses

LENGTHS = [9, 30, 14, 3, 22]
RANK_8 = AdapterSettings(rank=8, alpha=16.0)
CPU = torch.device("cpu")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),
]


@pytest.fixture
def rows(make_rows) -> list[EncodedExample]:
    return make_rows(LENGTHS)


def by_unit(
    model: AdaptedModel, rows: Sequence[EncodedExample], owners: Sequence[int] | None = None
) -> torch.Tensor:
    """Return our gradients, one row a unit."""
    owners = range(len(rows)) if owners is None else owners
    gradients = UnitGradients(model, max(owners) + 1)
    batch = collate(rows, model.device)
    with gradients.listening(owners, batch.input_ids.shape[1]):
        sequence_losses(model, batch).sum().backward()
    return gradients.slots


def by_opacus(model: AdaptedModel, rows: Sequence[EncodedExample]) -> torch.Tensor:
    from opacus import GradSampleModule

    model.train_mode(gradient_checkpointing=False)
    hooked = GradSampleModule(model.base.network, loss_reduction="sum")
    sequence_losses(model, collate(rows, model.device)).sum().backward()
    weights: list[Any] = [model.factor_modules()[spec.name].weight for spec in model.schema.tensors]
    found = [weight.grad_sample.reshape(len(rows), -1) for weight in weights]
    hooked.remove_hooks()
    return torch.cat(found, dim=1)


def by_autograd(model: AdaptedModel, row: EncodedExample) -> torch.Tensor:
    """Return the gradient of one row alone, of Hugging Face's loss."""
    ids = torch.from_numpy(row.input_ids.astype(np.int64))[None]
    labels = ids.where(torch.from_numpy(row.targets)[None], torch.tensor(-100))
    model.gradient.zero_()
    network: Any = model.base.network
    network(input_ids=ids, labels=labels).loss.backward()
    return model.gradient.clone()


def saved_model(directory: Path, tokenizer: Path, network: Any) -> Path:
    import shutil

    network.save_pretrained(directory)
    for file in tokenizer.glob("*token*"):
        shutil.copy(file, directory)
    return directory


@pytest.fixture
def other_model(tiny_model: Path, tmp_path: Path):
    """Build an adapted model of another architecture: GPT-2 (Conv1D) or OPT (flattens rows)."""
    from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

    def make(kind: str) -> AdaptedModel:
        common: dict[str, Any] = {"vocab_size": 320, "bos_token_id": 1, "eos_token_id": 1}
        with torch.random.fork_rng():
            torch.manual_seed(5)
            if kind == "gpt2":
                quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
                config = GPT2Config(
                    n_embd=32, n_layer=2, n_head=4, n_positions=64, **quiet, **common
                )
                network: Any = GPT2LMHeadModel(config)
            else:
                config = OPTConfig(
                    hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
                    word_embed_proj_dim=32, max_position_embeddings=64, dropout=0.0,
                    pad_token_id=0, **common,
                )  # fmt: skip
                network = OPTForCausalLM(config)
        directory = saved_model(tmp_path / kind, tiny_model, network)
        base = load_base(directory, quantization="none", dtype=torch.float32, device=CPU)
        model = AdaptedModel(base, RANK_8)
        torch.nn.init.normal_(model.weights, std=0.1, generator=torch.Generator().manual_seed(1))
        return model

    return make


# The same as others compute


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_equal_those_of_opacus(make_model, rows, quantization, checkpointing: bool):
    model = make_model(RANK_8, quantization=quantization, noise=0.1)
    expected = by_opacus(model, rows)
    model.train_mode(gradient_checkpointing=checkpointing)
    found = by_unit(model, rows)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (found.abs().amax(dim=1) > 1e-2).all()


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
def test_a_base_of_conv1d_equals_opacus(other_model, rows):
    model = other_model("gpt2")
    require_separable(model)
    expected = by_opacus(model, rows)
    torch.testing.assert_close(by_unit(model, rows), expected, atol=1e-5, rtol=1e-5)


def test_a_network_that_flattens_its_rows_is_told_apart(other_model, rows):
    """OPT: Opacus takes tokens for rows there, so plain autograd is the reference."""
    model = other_model("opt")
    require_separable(model)
    expected = torch.stack([by_autograd(model, row) for row in rows])
    torch.testing.assert_close(by_unit(model, rows), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "targets", [("q_proj",), ("v_proj", "down_proj"), ("gate_proj", "up_proj")], ids=str
)
def test_every_target_equals_opacus(make_model, rows, targets):
    settings = RANK_8.model_copy(update={"target_modules": targets})
    model = make_model(settings, noise=0.1)
    expected = by_opacus(model, rows)
    torch.testing.assert_close(by_unit(model, rows), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_each_gradient_is_that_of_the_row_alone_under_anothers_loss(make_model, rows, quantization):
    model = make_model(RANK_8, quantization=quantization, noise=0.1)
    expected = torch.stack([by_autograd(model, row) for row in rows])
    torch.testing.assert_close(by_unit(model, rows), expected, atol=1e-5, rtol=1e-5)


def test_rows_of_a_unit_add_up_in_any_order(make_model, rows):
    model = make_model(noise=0.1)
    single = by_unit(model, rows)
    found = by_unit(model, rows, [1, 0, 1, 1, 2])
    expected = torch.stack([single[1], single[0] + single[2] + single[3], single[4]])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_slots_gather_over_several_passes(make_model, rows):
    model = make_model(noise=0.1)
    expected = by_unit(model, rows, [0, 0, 0, 0, 0])
    gradients = UnitGradients(model, 1)
    for row in rows:
        batch = collate([row], CPU)
        with gradients.listening([0], len(row)):
            sequence_losses(model, batch).sum().backward()
    torch.testing.assert_close(gradients.slots, expected, atol=1e-5, rtol=1e-5)


def test_a_module_that_is_used_twice_gathers_both(make_model, rows, monkeypatch):
    model = make_model(noise=0.1)
    once = model.target_logits

    def twice(input_ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return once(input_ids, targets) - 0.5 * once(input_ids.flip(0) * 0 + 7, targets)

    monkeypatch.setattr(model, "target_logits", twice)
    model.gradient.zero_()
    sequence_losses(model, collate(rows, CPU)).sum().backward()
    torch.testing.assert_close(by_unit(model, rows).sum(0), model.gradient, atol=1e-5, rtol=1e-5)


def test_without_listening_all_is_as_before(make_model, rows):
    model = make_model(noise=0.1)
    gradients = UnitGradients(model, 1)
    with pytest.raises(ZeroDivisionError), gradients.listening([0], 3):
        _ = 1 / 0
    assert all("forward" not in vars(part) for part in model.factor_modules().values())
    expected = by_unit(model, rows).sum(dim=0)
    model.gradient.zero_()
    sequence_losses(model, collate(rows, CPU)).sum().backward()
    torch.testing.assert_close(model.gradient, expected, atol=1e-5, rtol=1e-5)
    assert not gradients.slots.any()


def test_while_listening_weights_get_no_gradient(make_model, rows):
    model = make_model(noise=0.1)
    by_unit(model, rows)
    assert not model.gradient.any()


def test_a_rows_loss_does_not_depend_on_the_others(make_model, make_rows):
    rows = make_rows([40, 4, 11])
    model = make_model(noise=0.1)
    together = sequence_losses(model, collate(rows, CPU))
    alone = torch.cat([sequence_losses(model, collate([row], CPU)) for row in rows])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


# The clip


@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=30),
    st.floats(1e-6, 1e6),
)
def test_a_clipped_gradient_has_at_most_the_norm_of_the_clip(values, clip):
    gradient = torch.tensor(values, dtype=torch.float32)
    found = clipped(gradient, clip)
    assert found is not None and found.dtype == torch.float64
    assert float(found.norm()) <= clip * (1 + 1e-12)
    norm = float(gradient.double().norm())
    torch.testing.assert_close(found * max(norm, clip), gradient.double() * clip)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_counts_as_nothing(bad):
    assert clipped(torch.tensor([1.0, bad]), 1.0) is None


# What is refused


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_separable_model_passes_and_keeps_its_adapter(make_model, quantization, dtype):
    model = make_model(quantization=quantization, dtype=dtype, noise=0.3)
    before = model.read().values
    require_separable(model)
    assert torch.equal(model.read().values, before)


def test_the_measurement_is_made_once(make_model, monkeypatch):
    model = make_model()
    require_separable(model)
    monkeypatch.setattr(separable, "sequence_losses", None)
    require_separable(model)
    with pytest.raises(TypeError):
        require_separable(make_model())


@pytest.mark.parametrize("norm", [torch.nn.BatchNorm1d, torch.nn.SyncBatchNorm])
def test_batch_norm_is_refused_by_name(make_model, norm):
    model = make_model()
    model.base.network.model.layers[1].extra = norm(4)
    with pytest.raises(NotSeparable, match=rf"layers\.1\.extra \({norm.__name__}\)"):
        require_separable(model)


def test_a_token_mean_over_the_batch_is_refused(make_model, monkeypatch):
    """What Hugging Face's num_items_in_batch does."""

    def over_the_batch(model: AdaptedModel, batch: Any) -> torch.Tensor:
        counts = batch.targets.sum(dim=1)
        return sequence_losses(model, batch) * counts / counts.sum()

    monkeypatch.setattr(separable, "sequence_losses", over_the_batch)
    with pytest.raises(NotSeparable, match="depends on the other records"):
        require_separable(make_model())


def test_a_collator_that_mixes_records_is_refused(make_model, monkeypatch):
    def packing(rows: Any, device: torch.device) -> Any:
        batch = collate(rows, device)
        batch.input_ids[-1, 0] = batch.input_ids[0, 1]
        return batch

    monkeypatch.setattr(separable, "collate", packing)
    with pytest.raises(NotSeparable, match="depends on the other records"):
        require_separable(make_model())


def test_a_network_that_mixes_rows_is_refused(make_model):
    model = make_model()
    norm = model.base.network.model.layers[0].input_layernorm
    norm.register_forward_hook(lambda _module, _inputs, output: output - output.mean(0))
    before = model.read().values
    with pytest.raises(NotSeparable, match="depends on the other records"):
        require_separable(model)
    assert torch.equal(model.read().values, before)


def test_a_factor_that_is_used_behind_its_modules_back_is_refused(make_model):
    model = make_model()
    layer: Any = model.base.network.model.layers[0].self_attn.q_proj
    factor = layer.lora_A["default"]
    layer.register_forward_hook(
        lambda _module, inputs, output: output + (inputs[0] @ factor.weight.T).mean()
    )
    with pytest.raises(NotSeparable):
        require_separable(model)


def test_a_factor_of_another_kind_is_refused_by_name(make_model):
    class Other(torch.nn.Linear):
        pass

    model = make_model()
    layer: Any = model.base.network.model.layers[0].self_attn.q_proj
    layer.lora_A["default"].__class__ = Other
    with pytest.raises(NotSeparable, match=r"layers\.0\.self_attn\.q_proj\.lora_A.* is Other"):
        UnitGradients(model, 2)


def test_a_trainable_factor_that_no_module_owns_is_refused_by_name(make_model, monkeypatch):
    model = make_model()
    modules = model.factor_modules()
    name = sorted(modules)[3]
    monkeypatch.setattr(
        model, "factor_modules", lambda: {key: modules[key] for key in modules if key != name}
    )
    with pytest.raises(NotSeparable, match=name):
        UnitGradients(model, 2)


def test_values_that_are_not_laid_out_by_row_are_refused(make_model, rows):
    """As in a mixture of experts, which sends single tokens to a module."""
    model = make_model(noise=0.1)
    mlp: Any = model.base.network.model.layers[0].mlp
    mlp.down_proj.lora_A["default"].register_forward_pre_hook(lambda _m, inputs: inputs[0][0, :4])
    mlp.down_proj.lora_B["default"].register_forward_hook(lambda _m, _i, output: output.sum())
    with pytest.raises(NotSeparable, match=r"down_proj\.lora_[AB]\.weight computes on values"):
        by_unit(model, rows)


def test_a_broken_model_is_told_without_records(make_model):
    model = make_model()
    for parameter in model.base.network.model.norm.parameters():
        parameter.data.fill_(math.nan)
    with pytest.raises(NotFinite, match="made-up rows"):
        require_separable(model)
