"""Adapter directories: stock PEFT reads what is written here, and the other way round."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fedpeft.adapters import load_adapter, load_settings_of, save_adapter
from fedpeft.config import AdapterSettings
from fedpeft.errors import AdapterError, SchemaMismatch, StorageError

SETTINGS = AdapterSettings(rank=4, alpha=8.0, dropout=0.1)
LISTED = AdapterSettings(rank=2, alpha=3.0, target_modules=("q_proj", "down_proj"))
# peft 0.21 reads an attribute that transformers 5.23 calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
TOKENS = torch.tensor([[5, 9, 200, 31, 7, 64], [300, 4, 4, 17, 90, 1]])


def plain_base(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def edit_config(directory: Path, **changes: object) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def saved(make_model, tmp_path: Path):
    """An adapter directory, and the model whose adapter it is."""
    model = make_model(SETTINGS, noise=0.1)
    save_adapter(model.read(), SETTINGS, tmp_path / "adapter", base_name="base")
    return tmp_path / "adapter", model


@pytest.mark.parametrize(
    "changes",
    [
        {"peft_type": "LOHA"},
        {"bias": "all"},
        {"use_dora": True},
        {"use_rslora": True},
        {"modules_to_save": ["lm_head"]},
        {"rank_pattern": {"q_proj": 2}},
        {"alpha_pattern": {"q_proj": 2}},
        {"lora_bias": True},
        {"alora_invocation_tokens": [3, 4]},
        {"use_qalora": True},
        {"layer_replication": [[0, 2]]},
        {"trainable_token_indices": [1, 2]},
        {"target_parameters": ["experts.weight"]},
        {"layers_to_transform": [0]},
        {"exclude_modules": ["v_proj"]},
        {"init_lora_weights": "pissa"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_an_adapter_beyond_plain_lora_is_refused(saved, changes: dict[str, object]):
    directory, _ = saved
    edit_config(directory, **changes)
    with pytest.raises(AdapterError, match="not a plain LoRA adapter"):
        load_settings_of(directory)


def test_a_pattern_of_target_modules_is_refused(saved):
    directory, _ = saved
    edit_config(directory, target_modules=".*_proj")
    with pytest.raises(AdapterError, match="pattern"):
        load_settings_of(directory)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '"LORA"', '{"peft_type": "LORA"}', "\udce4"], ids=range(6)
)
def test_an_unreadable_configuration_is_refused(saved, text: str):
    directory, _ = saved
    (directory / "adapter_config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(AdapterError, match=r"adapter_config\.json"):
        load_settings_of(directory)


@pytest.mark.parametrize(
    "changes", [{"r": 0}, {"r": "x"}, {"lora_alpha": 0}, {"lora_dropout": 1.5}, {"r": None}]
)
def test_a_setting_out_of_range_is_refused(saved, changes: dict[str, object]):
    directory, _ = saved
    edit_config(directory, **changes)
    with pytest.raises(AdapterError, match=r"adapter_config\.json"):
        load_settings_of(directory)


def test_a_missing_directory_is_refused(saved, tmp_path: Path):
    _, model = saved
    with pytest.raises(AdapterError, match="holds no readable adapter_config"):
        load_settings_of(tmp_path / "none")
    with pytest.raises(AdapterError, match="cannot be read as adapter weights"):
        load_adapter(tmp_path / "none", model.schema)


@pytest.mark.parametrize("kept", [0, 7, 100, -1])
def test_truncated_weights_are_refused(saved, kept: int):
    directory, model = saved
    path = directory / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(AdapterError, match="cannot be read as adapter weights"):
        load_adapter(directory, model.schema)


def test_an_adapter_of_another_base_model_is_refused(saved, make_model):
    directory, model = saved
    other = dataclasses.replace(model.schema, fingerprint="f" * 64)
    with pytest.raises(SchemaMismatch, match="belongs to base model"):
        load_adapter(directory, other)


@pytest.mark.parametrize("text", ["", "[]", "{}", '"x"'])
def test_a_damaged_record_of_the_base_model_is_refused(saved, text: str):
    directory, model = saved
    (directory / "fedpeft.json").write_text(text)
    with pytest.raises(AdapterError, match=r"fedpeft\.json is damaged"):
        load_adapter(directory, model.schema)


def test_an_adapter_of_another_rank_is_refused(saved, make_model):
    directory, _ = saved
    with pytest.raises(SchemaMismatch):
        load_adapter(directory, make_model(AdapterSettings(rank=2)).schema)


def test_a_surplus_tensor_is_refused(saved):
    directory, model = saved
    tensors = load_file(directory / "adapter_model.safetensors")
    tensors["base_model.model.extra.lora_A.weight"] = torch.ones(4, 4)
    save_file(tensors, directory / "adapter_model.safetensors")
    with pytest.raises(SchemaMismatch):
        load_adapter(directory, model.schema)


def test_a_folder_that_cannot_be_written_is_explained(saved, tmp_path: Path):
    _, model = saved
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="file"):
        save_adapter(model.read(), SETTINGS, tmp_path / "file", base_name="base")


@pytest.mark.parametrize("settings", [SETTINGS, LISTED], ids=["all-linear", "listed"])
def test_plain_peft_loads_it_with_the_same_logits(
    settings: AdapterSettings, make_model, tiny_model: Path, tmp_path: Path
):
    model = make_model(settings, noise=0.1)
    model.eval_mode()
    save_adapter(model.read(), settings, tmp_path, base_name=str(tiny_model))
    loaded = PeftModel.from_pretrained(plain_base(tiny_model), str(tmp_path)).eval()
    with torch.no_grad():
        ours = model.base.network(input_ids=TOKENS).logits
        theirs = loaded(input_ids=TOKENS).logits
        bare = plain_base(tiny_model)(input_ids=TOKENS).logits
    torch.testing.assert_close(theirs, ours, atol=1e-6, rtol=0)
    assert (ours - bare).abs().max() > 0.01


@pytest.mark.parametrize("target", ["all-linear", ["q_proj", "down_proj"]], ids=str)
def test_what_plain_peft_saves_is_loaded(
    target: str | list[str], make_model, tiny_model: Path, tmp_path: Path
):
    config = LoraConfig(r=2, lora_alpha=5, target_modules=target, task_type="CAUSAL_LM")
    theirs = get_peft_model(plain_base(tiny_model), config).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    theirs.save_pretrained(str(tmp_path))
    settings = load_settings_of(tmp_path)
    model = make_model(settings)
    model.load(load_adapter(tmp_path, model.schema))
    model.eval_mode()
    assert (settings.rank, settings.alpha) == (2, 5.0)
    with torch.no_grad():
        expected = theirs(input_ids=TOKENS).logits
        got = model.base.network(input_ids=TOKENS).logits
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("settings", [SETTINGS, LISTED], ids=["all-linear", "listed"])
def test_settings_and_values_come_back(settings: AdapterSettings, make_model, tmp_path: Path):
    model = make_model(settings, noise=0.1)
    save_adapter(model.read(), settings, tmp_path, base_name="base")
    found = load_settings_of(tmp_path)
    assert set(found.target_modules) == set(settings.target_modules)
    assert (found.rank, found.alpha, found.dropout) == (
        settings.rank,
        settings.alpha,
        settings.dropout,
    )
    assert torch.equal(load_adapter(tmp_path, model.schema).values, model.read().values)


def test_the_base_model_is_recorded_beside_the_weights(saved):
    directory, model = saved
    config = json.loads((directory / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "base"
    recorded = json.loads((directory / "fedpeft.json").read_text())
    assert recorded == {"schema": 1, "base_fingerprint": model.schema.fingerprint}


def test_the_same_adapter_gives_the_same_bytes(saved, tmp_path: Path):
    directory, model = saved
    save_adapter(model.read(), SETTINGS, tmp_path / "again", base_name="base")
    names = sorted(path.name for path in directory.iterdir())
    assert names == ["adapter_config.json", "adapter_model.safetensors", "fedpeft.json"]
    for name in names:
        assert (directory / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
