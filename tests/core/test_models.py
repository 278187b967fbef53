"""Base models: what is refused, in which words, their identity, and the hardware they run on."""

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch

from fedpeft.config import AdapterSettings, Quantization
from fedpeft.errors import FingerprintMismatch, ModelError
from fedpeft.models import (
    adapter_schema,
    choose_dtype,
    context_length,
    fingerprint,
    load_base,
    load_tokenizer,
    require_fingerprint,
    resolve_base,
)

TOKENS = torch.tensor([[5, 9, 200, 31, 7, 64], [300, 4, 4, 17, 90, 1]])
CPU = torch.device("cpu")


def load(directory: Path, quantization: Quantization = "none", dtype: torch.dtype = torch.float32):
    return load_base(directory, quantization=quantization, dtype=dtype, device=CPU)


# Where a base model lies


@pytest.mark.parametrize(
    ("missing", "told"),
    [
        ("tokenizer.json", "no tokenizer"),
        ("config.json", "no config.json"),
        ("model.safetensors", r"no \*\.safetensors weights; convert .* \.bin files can run code"),
    ],
)
def test_a_missing_file_is_named(tiny_copy: Path, missing: str, told: str):
    (tiny_copy / missing).unlink()
    for use in (load, load_tokenizer, lambda path: adapter_schema(path, AdapterSettings())):
        with pytest.raises(ModelError, match=told):
            use(tiny_copy)
    with pytest.raises(ModelError, match=told):
        resolve_base(str(tiny_copy), relative_to=Path())


def test_pickled_weights_are_not_read(tiny_copy: Path):
    (tiny_copy / "model.safetensors").rename(tiny_copy / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        load(tiny_copy)


@pytest.mark.parametrize("name", ["../none", "/none/at/all", "none", "./a/b", "~nobody-here/x"])
def test_a_directory_that_is_not_there_is_named(name: str, tmp_path: Path):
    with pytest.raises(ModelError, match="does not exist"):
        resolve_base(name, relative_to=tmp_path)


def test_a_hub_id_is_refused_offline_and_says_how_to_allow_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("FEDPEFT_ALLOW_HUB", raising=False)
    with pytest.raises(ModelError) as caught:
        resolve_base("meta-llama/Llama-3.2-1B", relative_to=tmp_path)
    assert "hubs are off; copy the model here, or set FEDPEFT_ALLOW_HUB=1" in str(caught.value)


def test_a_hub_that_cannot_be_reached_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # The hub library itself is still offline here: it read its switch when it was imported.
    monkeypatch.setenv("FEDPEFT_ALLOW_HUB", "1")
    for name in ("some-body/some-model", "no spaces/allowed here"):
        with pytest.raises(ModelError, match="could not be downloaded"):
            resolve_base(name, relative_to=tmp_path)


def test_relative_paths_count_from_the_given_folder(tiny_model: Path):
    assert resolve_base("tiny", relative_to=tiny_model.parent) == tiny_model.resolve()
    assert resolve_base("embedded", relative_to=tiny_model).name == "base"


def test_the_context_is_read_from_the_configuration(tiny_copy: Path):
    assert context_length(tiny_copy) == 128
    (tiny_copy / "config.json").write_text('{"text_config": {"max_position_embeddings": 64}}')
    assert context_length(tiny_copy) == 64
    (tiny_copy / "config.json").write_text("{}")
    assert context_length(tiny_copy) is None


# Files that are there and damaged


def test_truncated_weights_are_refused(tiny_copy: Path):
    path = tiny_copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(tiny_copy)


def test_weights_that_lack_a_tensor_are_refused_and_not_made_up(tiny_copy: Path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(tiny_copy / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tiny_copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"lack .*layers\.1\.mlp\.up_proj"):
        load(tiny_copy)


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "{}", '{"model_type": "no-such"}', '{"model_type": "t5"}'],
)
def test_a_configuration_of_no_causal_language_model_is_refused(tiny_copy: Path, text: str):
    (tiny_copy / "config.json").write_text(text)
    with pytest.raises(ModelError):
        load(tiny_copy)
    with pytest.raises(ModelError):
        adapter_schema(tiny_copy, AdapterSettings())


def test_a_setting_of_the_wrong_type_is_refused(tiny_copy: Path):
    config = json.loads((tiny_copy / "config.json").read_text())
    (tiny_copy / "config.json").write_text(json.dumps({**config, "hidden_size": "wide"}))
    with pytest.raises(ModelError):
        load(tiny_copy)
    with pytest.raises(ModelError):
        adapter_schema(tiny_copy, AdapterSettings())


def test_a_damaged_tokenizer_is_refused(tiny_copy: Path):
    (tiny_copy / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(ModelError, match="tokenizer"):
        load_tokenizer(tiny_copy)


def test_a_model_with_code_of_its_own_is_refused_without_asking(
    tiny_copy: Path, monkeypatch: pytest.MonkeyPatch
):
    config = json.loads((tiny_copy / "config.json").read_text())
    own = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    config.update(model_type="own", auto_map=own)
    (tiny_copy / "config.json").write_text(json.dumps(config))
    ran = tiny_copy / "ran"
    (tiny_copy / "own.py").write_text(f"__import__('pathlib').Path({str(ran)!r}).touch()")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    for use in (load, lambda path: adapter_schema(path, AdapterSettings())):
        with pytest.raises(ModelError):
            use(tiny_copy)
    assert not ran.exists()


# Identity


def test_another_base_model_is_refused_by_its_fingerprint(tiny_model: Path):
    with pytest.raises(FingerprintMismatch, match=r"has fingerprint .* federation uses ffff"):
        require_fingerprint(fingerprint(tiny_model), "f" * 64, tiny_model)


def test_the_fingerprint_is_the_hash_of_names_and_hashes(tmp_path: Path):
    parts = {"b.safetensors": b"two", "a.safetensors": b"one"}
    for name, content in parts.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "config.json").write_text("{}")
    lines = [f"{name}\0{hashlib.sha256(parts[name]).hexdigest()}\n" for name in sorted(parts)]
    assert fingerprint(tmp_path) == hashlib.sha256("".join(lines).encode()).hexdigest()


def test_a_changed_file_changes_the_fingerprint_though_its_times_were_put_back(tiny_copy: Path):
    path = tiny_copy / "model.safetensors"
    before, times = fingerprint(tiny_copy), path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert path.stat().st_mtime_ns == times.st_mtime_ns
    assert fingerprint(tiny_copy) != before


def test_an_unchanged_file_is_hashed_once(tiny_copy: Path, monkeypatch: pytest.MonkeyPatch):
    before = fingerprint(tiny_copy)
    opened: list[str] = []
    open_it = Path.open

    def read(self: Path, *arguments, **options):
        opened.append(self.suffix)
        return open_it(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", read)
    assert fingerprint(tiny_copy) == before
    assert ".safetensors" not in opened


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"schema": 2, "sha256": "x"}', '{"schema": 1}']
)
def test_a_damaged_cache_is_not_believed(
    content: str, tiny_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = fingerprint(tiny_copy)
    (cached,) = (tmp_path / "cache" / "fedpeft" / "fingerprints").iterdir()
    cached.write_text(content)
    assert fingerprint(tiny_copy) == before


def test_a_cache_that_cannot_be_written_is_done_without(
    tiny_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    before = fingerprint(tiny_copy)
    (tmp_path / "file").write_text("not a folder")  # even root cannot write below it
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert fingerprint(tiny_copy) == before


# Hardware


def test_automatic_bfloat16_only_where_the_processor_has_it(monkeypatch: pytest.MonkeyPatch):
    for flags, expected in (
        (frozenset({"avx512f"}), torch.float32),
        (frozenset({"amx_bf16"}), torch.bfloat16),
        (frozenset[str](), torch.float32),
    ):
        monkeypatch.setattr("fedpeft.models.hardware._cpu_flags", lambda flags=flags: flags)
        assert choose_dtype("auto", CPU) == expected
        assert choose_dtype("float32", CPU) == torch.float32
        assert choose_dtype("bfloat16", CPU) == torch.bfloat16
