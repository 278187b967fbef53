"""The adapter on a base model: its schema, the flat vector, the workbench, and 4-bit bases."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fedpeft.adapters import schema_of
from fedpeft.config import AdapterSettings, ComputeDtype, Quantization
from fedpeft.errors import AdapterError, SchemaMismatch
from fedpeft.models import (
    AdaptedModel,
    Workbench,
    adapter_schema,
    fingerprint,
    initial_state,
    load_base,
)

TOKENS = torch.tensor([[5, 9, 200, 31, 7, 64], [300, 4, 4, 17, 90, 1]])
CPU = torch.device("cpu")


def load(directory: Path, quantization: Quantization = "none", dtype: torch.dtype = torch.float32):
    return load_base(directory, quantization=quantization, dtype=dtype, device=CPU)


# The adapter's schema without the model


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("target", ["all-linear", ("q_proj", "down_proj")], ids=str)
def test_the_schema_from_the_configuration_is_the_loaded_models(
    quantization, target, make_model, tiny_model
):
    settings = AdapterSettings(rank=3, target_modules=target)
    model = make_model(settings, quantization=quantization)
    assert adapter_schema(tiny_model, settings) == model.schema


def test_the_schema_needs_no_weights(tiny_copy: Path, monkeypatch: pytest.MonkeyPatch):
    expected = [spec.name for spec in adapter_schema(tiny_copy, AdapterSettings()).tensors]
    (tiny_copy / "model.safetensors").write_bytes(b"these are no weights")

    def loaded(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", loaded)
    found = adapter_schema(tiny_copy, AdapterSettings())
    assert [spec.name for spec in found.tensors] == expected


def test_the_schema_of_a_model_larger_than_memory_is_known_in_a_moment(tiny_copy: Path):
    config = json.loads((tiny_copy / "config.json").read_text())
    config.update(hidden_size=65536, intermediate_size=262144, num_hidden_layers=4, head_dim=16384)
    (tiny_copy / "config.json").write_text(json.dumps(config))
    specs = adapter_schema(tiny_copy, AdapterSettings(rank=1)).tensors
    assert max(max(spec.shape) for spec in specs) == 262144


def test_unknown_target_modules_name_the_linear_ones(tiny_model: Path):
    settings = AdapterSettings(target_modules=("c_attn",))
    with pytest.raises(AdapterError, match=r"'c_attn'.* linear modules are .*gate_proj, .*q_proj"):
        adapter_schema(tiny_model, settings)


def test_one_misspelt_target_module_among_good_ones_is_refused(tiny_model: Path):
    settings = AdapterSettings(target_modules=("q_proj", "v_porj"))
    with pytest.raises(AdapterError, match="v_porj"):
        adapter_schema(tiny_model, settings)


def test_a_target_that_is_not_linear_is_refused(tiny_model: Path):
    with pytest.raises(AdapterError):
        adapter_schema(tiny_model, AdapterSettings(target_modules=("embed_tokens",)))


@pytest.mark.parametrize("which", ["tiny_model", "embedded_model"])
def test_the_head_can_have_an_adapter_though_the_embeddings_have_none(which: str, request):
    """PEFT would count the embeddings as part of the adapter; the embedded model shares them."""
    directory: Path = request.getfixturevalue(which)
    settings = AdapterSettings(rank=2, target_modules=("lm_head", "q_proj"))
    schema = adapter_schema(directory, settings)
    modules = {spec.module.rsplit(".", 1)[-1] for spec in schema.tensors}
    assert modules == {"lm_head", "q_proj"}
    model = AdaptedModel(load(directory), settings)
    assert model.schema == schema
    before = logits(model)
    model.weights.data.fill_(0.1)
    assert not torch.equal(logits(model), before)


def test_the_start_is_a_function_of_the_seed(tiny_model: Path):
    schema = adapter_schema(tiny_model, AdapterSettings())
    assert torch.equal(initial_state(schema, 1).values, initial_state(schema, 1).values)
    assert not torch.equal(initial_state(schema, 1).values, initial_state(schema, 2).values)


def test_the_start_is_drawn_as_peft_draws_it(tiny_model: Path):
    for name, tensor in (
        initial_state(adapter_schema(tiny_model, AdapterSettings()), 0).tensors().items()
    ):
        if ".lora_B." in name:
            assert not tensor.any()
        else:
            bound = 1 / tensor.shape[1] ** 0.5  # Kaiming-uniform with a = sqrt(5)
            assert 0.9 * bound < tensor.abs().max() <= bound


# The adapter on the model


@torch.no_grad()
def logits(model: AdaptedModel) -> torch.Tensor:
    model.eval_mode()
    return model.base.network(input_ids=TOKENS).logits


def test_the_start_gives_exactly_the_base_models_logits(make_model, tiny_model: Path):
    with torch.no_grad():
        bare = load(tiny_model).network.eval()(input_ids=TOKENS).logits
    assert torch.equal(logits(make_model()), bare)


def test_an_adapter_of_another_schema_is_not_loaded(make_model):
    model = make_model()
    before = model.read().values
    with pytest.raises(SchemaMismatch):
        model.load(initial_state(make_model(AdapterSettings(rank=2)).schema, 0))
    assert torch.equal(model.read().values, before)


def test_loading_changes_the_network_and_reading_copies(make_model):
    model, other = make_model(), make_model(noise=0.1)
    model.load(other.read())
    assert torch.equal(logits(model), logits(other))
    model.read().values.zero_()
    assert torch.equal(model.read().values, other.read().values)


def test_only_the_flat_vector_is_trainable_and_backward_fills_its_gradient(make_model):
    model = make_model(noise=0.1)
    trainable = [p for p in model.base.network.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trainable) == model.schema.numel
    model.base.network(input_ids=TOKENS).logits.square().mean().backward()
    flat = torch.cat([grad.reshape(-1) for grad in _named_gradients(model)])
    assert model.gradient.count_nonzero() > 0.9 * model.schema.numel
    assert torch.equal(flat, model.gradient)


def _named_gradients(model: AdaptedModel) -> list[torch.Tensor]:
    named = {
        "base_model.model." + name.replace(".default", ""): parameter.grad
        for name, parameter in model.base.network.named_parameters()
        if parameter.requires_grad
    }
    found = [named[spec.name] for spec in model.schema.tensors]
    return [grad for grad in found if grad is not None]


def test_target_logits_are_those_of_the_positions_before_the_targets(make_model):
    model = make_model(noise=0.1)
    full = logits(model)
    targets = torch.tensor([[0, 0, 0, 1, 0, 1], [0, 0, 1, 1, 0, 0]]).bool()
    with torch.no_grad():
        got = model.target_logits(TOKENS, targets)
    expected = torch.stack([full[0, 2], full[0, 4], full[1, 1], full[1, 2]])
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)
    model._can_skip_logits = False
    with torch.no_grad():
        whole = model.target_logits(TOKENS, targets)
    torch.testing.assert_close(whole, expected, atol=1e-6, rtol=0)


def test_the_workbench_loads_the_base_once_and_swaps_adapters(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
):
    loads: list[Path] = []

    def counted(directory: Path, **options):
        loads.append(directory)
        return load_base(directory, **options)

    monkeypatch.setattr("fedpeft.models.workbench.load_base", counted)
    bench = Workbench()

    def adapted(rank: int, dtype: ComputeDtype = "float32") -> AdaptedModel:
        settings = AdapterSettings(rank=rank)
        return bench.adapted(tiny_model, settings, quantization="none", dtype=dtype)

    first = adapted(2)
    assert adapted(2) is first
    for rank in (4, 1, 2):
        model = adapted(rank)
        assert {spec.rank for spec in model.schema.tensors} == {rank}
        assert model.schema == schema_of(model.read().tensors(), fingerprint(tiny_model), "float32")
    with torch.no_grad():
        bare = load(tiny_model).network.eval()(input_ids=TOKENS).logits
    model.load(initial_state(model.schema, 0))
    assert torch.equal(logits(model), bare)
    assert len(loads) == 1
    adapted(2, "bfloat16")
    assert len(loads) == 2


def test_the_workbench_goes_on_after_settings_that_do_not_fit(tiny_model: Path):
    bench = Workbench()
    good, bad = AdapterSettings(rank=2), AdapterSettings(target_modules=("embed_tokens",))
    bench.adapted(tiny_model, good, quantization="none", dtype="float32")
    for _ in range(2):
        with pytest.raises(AdapterError):
            bench.adapted(tiny_model, bad, quantization="none", dtype="float32")
    model = bench.adapted(tiny_model, good, quantization="none", dtype="float32")
    before = logits(model)
    model.weights.data.fill_(0.1)
    assert not torch.equal(logits(model), before)


# 4-bit


def test_nf4_quantises_every_linear_layer_but_the_head(make_model):
    from bitsandbytes.nn.modules import Linear4bit

    network = make_model(quantization="nf4").base.network
    layers: list[Any] = [m for m in network.modules() if isinstance(m, Linear4bit)]
    assert len(layers) == 2 * 7
    assert {layer.weight.quant_type for layer in layers} == {"nf4"}
    assert {layer.weight.dtype for layer in layers} == {torch.uint8}


def test_no_full_precision_copy_of_a_quantised_weight_exists(make_model):
    from torch.nn import Module

    model = make_model(quantization="nf4")
    network: Module = model.base.network
    held = {
        tensor.data_ptr(): tensor.numel() * tensor.element_size()
        for tensor in [*network.parameters(), *network.buffers()]
    }
    head_and_embeddings = 2 * 320 * 32 * 4
    linear = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32)
    adapter = model.schema.numel * 4
    norms_and_rotary = 5 * 32 * 4 + 2 * 4 * 4
    assert sum(held.values()) == head_and_embeddings + linear // 2 + adapter + norms_and_rotary


def _values_of(layer: Any) -> torch.Tensor:
    """Look up 4-bit codes in the table and scale them, as Dettmers et al. 2023 define NF4."""
    state, packed = layer.weight.quant_state, layer.weight.data.reshape(-1)
    codes = torch.stack([packed >> 4, packed & 15], dim=1).reshape(-1).long()
    second = state.state2
    scales = (
        second.code[state.absmax.long()] * second.absmax.repeat_interleave(256)[: len(state.absmax)]
    )
    scales = scales + state.offset
    return (state.code[codes].reshape(-1, 64) * scales[:, None]).reshape(state.shape)


@pytest.mark.parametrize("which", ["tiny_model", "embedded_model"])
def test_a_4_bit_model_computes_with_the_weights_that_it_was_given(which: str, request):
    """In the tiny model some input widths are no multiple of a block, in the embedded one all."""
    from bitsandbytes.nn.modules import Linear4bit

    directory: Path = request.getfixturevalue(which)
    small, full = load(directory, "nf4").network.eval(), load(directory).network.eval()
    for name, layer in small.named_modules():
        if isinstance(layer, Linear4bit):
            weight, found = full.get_parameter(f"{name}.weight"), _values_of(layer)
            assert 0.02 < (found - weight).norm() / weight.norm() < 0.12
            weight.data = found
    inputs = small.get_parameter("model.embed_tokens.weight").detach()[TOKENS]
    results: list[torch.Tensor | None] = []
    for network in (small, full):
        leaf = inputs.clone().requires_grad_()
        out = network(inputs_embeds=leaf).logits
        out.square().mean().backward()
        results += [out.detach(), leaf.grad]
        with torch.no_grad():
            torch.testing.assert_close(
                network(inputs_embeds=inputs).logits, out, rtol=1e-4, atol=1e-4
            )
    torch.testing.assert_close(results[0], results[2], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(results[1], results[3], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_evaluating_leaves_quantised_weights_as_they_are(make_model, dtype: torch.dtype):
    model = make_model(quantization="nf4", dtype=dtype)
    layer = model.base.network.get_submodule("model.layers.0.mlp.down_proj").base_layer
    before, scales = layer.weight.data.clone(), layer.weight.quant_state.absmax.clone()
    first = logits(model)
    assert torch.equal(layer.weight.data, before)
    assert torch.equal(layer.weight.quant_state.absmax, scales)
    model.train_mode(gradient_checkpointing=False)
    assert torch.equal(logits(model), first)


def test_the_embedded_model_works_in_4_bit(embedded_model: Path):
    model = AdaptedModel(load(embedded_model, "nf4"), AdapterSettings(rank=2))
    model.load(initial_state(model.schema, 0))
    assert torch.isfinite(logits(model)).all()
