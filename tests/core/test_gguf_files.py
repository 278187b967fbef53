"""GGUF files as files: damaged ones are refused, new ones appear whole, what cannot be is said."""

import json
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedpeft.config import AdapterSettings
from fedpeft.errors import ModelError, NotConvertible, StorageError
from fedpeft.gguf_format import Quantisation, read_header, write_base
from fedpeft.gguf_format.layout import Tensor, write_gguf
from fedpeft.gguf_format.native import quantise
from fedpeft.models import adapter_schema, context_length, fingerprint, resolve_base

Q = GGMLQuantizationType


@pytest.fixture(scope="module")
def whole(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as a GGUF file; do not write to it."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_base(tiny_model, path, "q8_0")
    return path


# Damaged files


def test_a_file_that_was_cut_short_anywhere_is_refused(whole: Path, tmp_path: Path):
    data = whole.read_bytes()
    path = tmp_path / "cut.gguf"
    ends = [*range(0, 200, 7), *np.linspace(200, len(data) - 33, 40, dtype=int).tolist()]
    for end in ends:
        path.write_bytes(data[:end])
        with pytest.raises(ModelError, match=r"no usable GGUF file: .*; copy the file again"):
            read_header(path)


def test_a_base_that_was_cut_short_is_refused_wherever_it_is_named(whole: Path, tmp_path: Path):
    path = tmp_path / "cut.gguf"
    path.write_bytes(whole.read_bytes()[:-5000])
    with pytest.raises(ModelError, match=r"its tensor .* would end at"):
        resolve_base("cut.gguf", relative_to=tmp_path)
    with pytest.raises(ModelError, match=r"its tensor .* would end at"):
        adapter_schema(path, AdapterSettings())


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(place=st.integers(0, 3000), byte=st.integers(0, 255))
def test_a_changed_byte_is_refused_in_words_or_harmless(
    whole: Path, tmp_path: Path, place: int, byte: int
):
    data = bytearray(whole.read_bytes())
    data[place] = byte
    path = tmp_path / "changed.gguf"
    path.write_bytes(data)
    try:
        header = read_header(path)
    except ModelError:
        return
    assert all(it.begin + it.nbytes <= len(data) for it in header.tensors.values())


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "does not begin as one"),
        (b"not a model, but long enough to be one of them", "does not begin as one"),
        (b"GGUF" + (9).to_bytes(4, "little") + bytes(64), "of version 9"),
        (b"GGUF" + (3).to_bytes(4, "little") + b"\xff" * 64, "names .* tensors"),
        (b"GGUF" + (3).to_bytes(4, "little") + bytes(64), "does not name its architecture"),
    ],
)
def test_what_is_no_gguf_is_told(content: bytes, told: str, tmp_path: Path):
    path = tmp_path / "base.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=told):
        read_header(path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(ModelError, match=r"none\.gguf cannot be read"):
        resolve_base("none.gguf", relative_to=tmp_path)


def test_a_part_of_a_model_is_refused(tmp_path: Path):
    path = tmp_path / "base.gguf"
    write_gguf(path, {"general.architecture": "llama", "split.count": 3}, [])
    with pytest.raises(ModelError, match="one of 3 parts"):
        read_header(path)


def test_an_adapter_is_no_base(tmp_path: Path):
    path = tmp_path / "lora.gguf"
    write_gguf(path, {"general.architecture": "llama", "general.type": "adapter"}, [])
    with pytest.raises(ModelError, match="an adapter and no base model"):
        resolve_base("lora.gguf", relative_to=tmp_path)


# New files


def test_the_header_tells_what_was_written(whole: Path, tiny_model: Path):
    header = read_header(whole)
    assert (header.architecture, header.quantisation) == ("llama", "q8_0")
    assert header.fingerprint == fingerprint(tiny_model)
    assert header.context_length == context_length(whole) == 128
    assert not header.is_adapter


def test_the_librarys_own_reader_reads_the_file(whole: Path):
    reader = gguf.GGUFReader(whole)
    header = read_header(whole)
    assert {it.name: it.data_offset for it in reader.tensors} == {
        name: place.begin for name, place in header.tensors.items()
    }
    assert reader.fields["tokenizer.ggml.tokens"].contents()[:2] == ["<pad>", "<eos>"]


def test_the_same_base_gives_the_same_bytes(whole: Path, tiny_model: Path, tmp_path: Path):
    path = tmp_path / "again.gguf"
    write_base(tiny_model, path, "q8_0")
    assert path.read_bytes() == whole.read_bytes()


def test_another_base_has_another_fingerprint(whole: Path, tiny_copy: Path, tmp_path: Path):
    weights = tiny_copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    path = tmp_path / "other.gguf"
    write_base(tiny_copy, path, "q8_0")
    assert read_header(path).fingerprint != read_header(whole).fingerprint


def test_a_gguf_base_has_one_fingerprint_under_every_name(whole: Path, tmp_path: Path):
    path = tmp_path / "renamed.gguf"
    path.write_bytes(whole.read_bytes())
    assert fingerprint(path) == fingerprint(whole)


def test_progress_goes_up_to_the_whole(tiny_model: Path, tmp_path: Path):
    told: list[tuple[int, int]] = []
    write_base(
        tiny_model, tmp_path / "base.gguf", "f32", observe=lambda *counts: told.append(counts)
    )
    done = [count for count, _ in told]
    assert done == sorted(done)
    assert (
        told[-1][0]
        == told[-1][1]
        == sum(it.nbytes for it in read_header(tmp_path / "base.gguf").tensors.values())
    )


@pytest.fixture
def full_disk() -> Iterator[Callable[[int], None]]:
    """Let no file grow beyond so many bytes."""
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, usual[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, usual)


@pytest.mark.parametrize("limit", [100, 60_000])
def test_a_full_disk_leaves_what_was_there(
    limit: int, tiny_model: Path, tmp_path: Path, full_disk: Callable[[int], None]
):
    path = tmp_path / "base.gguf"
    path.write_bytes(b"the one before")
    full_disk(limit)
    with pytest.raises(StorageError, match=r"cannot write .*base\.gguf: file too large; check the"):
        write_base(tiny_model, path, "f32")
    assert [each.name for each in tmp_path.iterdir()] == ["base.gguf"]
    assert path.read_bytes() == b"the one before"


def test_a_file_that_was_begun_is_removed_when_anything_fails(tmp_path: Path):
    def blocks() -> list[bytes]:
        raise KeyboardInterrupt

    tensor = Tensor(name="x", shape=(4,), encoding=Q.F32, blocks=blocks)
    with pytest.raises(KeyboardInterrupt):
        write_gguf(tmp_path / "x.gguf", {"general.architecture": "llama"}, [tensor])
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_is_told(tiny_model: Path, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        write_base(tiny_model, tmp_path / "file" / "base.gguf", "f16")


def test_memory_stays_below_that_of_the_weights(tmp_path: Path):
    # 96 MiB of weights, of which no more than a few blocks may be in memory of our own.
    shape = (24, 1 << 20)
    row = np.zeros(shape[1], np.float32).tobytes()
    tensor = Tensor(name="x", shape=shape, encoding=Q.F32, blocks=lambda: (row for _ in range(24)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    write_gguf(tmp_path / "x.gguf", {"general.architecture": "llama"}, [tensor])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 48 << 10


# What llama.cpp quantises


@pytest.mark.parametrize("encoding", [Q.Q8_0, Q.Q4_0], ids=lambda each: each.name)
def test_bytes_are_those_of_the_gguf_library(encoding: GGMLQuantizationType):
    rows = np.random.default_rng(1).normal(size=(6, 512)).astype(np.float32)
    assert quantise(rows, encoding) == gguf.quantize(rows, encoding).tobytes()


@pytest.mark.parametrize(
    ("encoding", "bound"),
    [(Q.Q4_K, 0.08), (Q.Q5_K, 0.04), (Q.Q6_K, 0.02), (Q.Q5_0, 0.06), (Q.Q5_1, 0.05)],
    ids=lambda each: getattr(each, "name", ""),
)
def test_what_was_quantised_is_near_what_it_was(encoding: GGMLQuantizationType, bound: float):
    rows = np.random.default_rng(1).normal(size=(6, 512)).astype(np.float32)
    data = np.frombuffer(quantise(rows, encoding), np.uint8).reshape(6, -1)
    back = gguf.dequantize(data, encoding)
    error = np.sqrt(((back - rows) ** 2).mean())
    assert 0 < error < bound


# What cannot be written


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model_type": "mamba"}, "architecture 'mamba' cannot be written as GGUF"),
        ({"hidden_act": "relu"}, "hidden_act = relu"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type = dynamic",
        ),
        ({"vocab_size": 200}, "tokens beyond the model's 200 embeddings"),
    ],
)
def test_a_model_that_llama_cpp_cannot_run_is_refused_by_what_is_odd(
    changes: dict[str, Any], told: str, tiny_copy: Path, tmp_path: Path
):
    config = json.loads((tiny_copy / "config.json").read_text())
    (tiny_copy / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(NotConvertible, match=told):
        write_base(tiny_copy, tmp_path / "base.gguf", "f16")
    assert not (tmp_path / "base.gguf").exists()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"pre_tokenizer": {"type": "Whitespace"}}, "not byte-level"),
        ({"normalizer": {"type": "Lowercase"}}, "changes text by Lowercase"),
        (
            {
                "pre_tokenizer": {
                    "type": "Sequence",
                    "pretokenizers": [
                        {
                            "type": "Split",
                            "pattern": {"Regex": "[aeiou]"},
                            "behavior": "Isolated",
                            "invert": False,
                        },
                        {
                            "type": "ByteLevel",
                            "add_prefix_space": False,
                            "trim_offsets": True,
                            "use_regex": False,
                        },
                    ],
                }
            },
            "splits text in a way",
        ),
    ],
)
def test_a_tokenizer_that_llama_cpp_does_not_have_is_refused(
    changes: dict[str, Any], told: str, tiny_copy: Path, tmp_path: Path
):
    path = tiny_copy / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(NotConvertible, match=told):
        write_base(tiny_copy, tmp_path / "base.gguf", "f16")


@pytest.mark.parametrize("quantisation", ["f16", "q4_0"])
def test_weights_that_do_not_fit_are_refused(
    quantisation: Quantisation, tiny_copy: Path, tmp_path: Path
):
    from safetensors.torch import load_file, save_file

    tensors = load_file(tiny_copy / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][0, 0] = 1e6 if quantisation == "f16" else float("nan")
    save_file(tensors, tiny_copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(NotConvertible, match=f"{name} has values that are not finite"):
        write_base(tiny_copy, tmp_path / "base.gguf", quantisation)
    assert not (tmp_path / "base.gguf").exists()


def test_weights_that_lack_a_tensor_are_refused(tiny_copy: Path, tmp_path: Path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(tiny_copy / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tiny_copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"lack 1 tensors .* blk\.1\.ffn_up"):
        write_base(tiny_copy, tmp_path / "base.gguf", "f16")


def test_damaged_weights_are_refused(tiny_copy: Path, tmp_path: Path):
    path = tiny_copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ModelError, match="cannot be read as weights"):
        write_base(tiny_copy, tmp_path / "base.gguf", "f16")
