"""GGUF files against transformers: the same logits, tokens and adapters, in every architecture."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedpeft.adapters import AdapterState, save_adapter
from fedpeft.config import AdapterSettings
from fedpeft.errors import AdapterError, NotConvertible, SchemaMismatch
from fedpeft.gguf_format import (
    Quantisation,
    architecture,
    read_header,
    write_adapter,
    write_base,
)
from fedpeft.models import AdaptedModel, load_base, load_tokenizer

CPU = torch.device("cpu")
PROMPT = "The patient asks when to take the 15 tablets; don't wait.\n\nRest  for two weeks."
EXACT = 1e-4
"""Nats: 32-bit arithmetic in another order."""
GELU = 2e-2
"""Nats: llama.cpp looks its GELU up in a table of 16-bit numbers."""


def load_module() -> Any:
    path = Path(__file__).parents[2] / "benchmarks" / "llama_logits.py"
    spec = importlib.util.spec_from_file_location("llama_logits", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


LlamaModel = load_module().LlamaModel

SIZES: dict[str, Any] = {
    "vocab_size": 352,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
GEMMA: dict[str, Any] = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True, "head_dim": 32}),
    "llama-biased": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3-rope": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-linear": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen2-yarn": (
        "Qwen2",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "gemma2": ("Gemma2", GEMMA),
    "gemma3": ("Gemma3Text", {**GEMMA, "num_hidden_layers": 6}),
    "phi3": ("Phi3", {"sliding_window": None}),
    "phi3-partial": (
        "Phi3",
        {
            "sliding_window": None,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.75,
            },
            "hidden_size": 128,
        },
    ),
}
Build = Callable[[str], Path]


@pytest.fixture(scope="module")
def build(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Make the directory of a random model of an architecture, once a module."""
    import transformers

    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            family, changes = MODELS[name]
            config = getattr(transformers, f"{family}Config")(**{**SIZES, **changes})
            with torch.random.fork_rng():
                torch.manual_seed(5)
                causal = family.replace("Text", "")
                network = getattr(transformers, f"{causal}ForCausalLM")(config)
                for parameter in network.parameters():  # norms and biases that matter
                    if parameter.ndim == 1:
                        torch.nn.init.normal_(parameter, 0.5, 0.3)
            directory = tmp_path_factory.mktemp("models") / name
            network.save_pretrained(directory)
            for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
                shutil.copy(tiny_model / file, directory)
            made[name] = directory
        return made[name]

    return make


def model_of(base: Path, settings: AdapterSettings | None = None) -> AdaptedModel:
    """Load a base with an adapter, of noise where there are settings, else of zeros."""
    base_model = load_base(base, quantization="none", dtype=torch.float32, device=CPU)
    model = AdaptedModel(base_model, settings or AdapterSettings(rank=1))
    values = torch.zeros(model.schema.numel)
    if settings is not None:
        generator = torch.Generator().manual_seed(3)
        values = torch.randn(model.schema.numel, generator=generator) * 0.3
    model.load(AdapterState(model.schema, values))
    model.eval_mode()
    return model


def log_probabilities(model: AdaptedModel, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits = model.base.network(torch.tensor([tokens])).logits[0]
    return logits.log_softmax(-1)


def llama_log_probabilities(
    path: Path, tokens: list[int], adapter: Path | None = None
) -> torch.Tensor:
    with LlamaModel(path, adapter=adapter, context=128, exact=True) as model:
        return torch.from_numpy(model.logits(tokens)).log_softmax(-1)


def write_peft(model: AdaptedModel, directory: Path, **config: Any) -> Path:
    """Save the adapter in ``model``, with other settings of PEFT put into its configuration."""
    save_adapter(model.read(), model.settings, directory, base_name="base")
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return directory


def bound(name: str) -> float:
    return GELU if name.startswith("gemma") else EXACT


@pytest.mark.parametrize("name", MODELS)
def test_a_file_in_32_bits_gives_the_logits_of_transformers(
    name: str, build: Build, tmp_path: Path
):
    path = tmp_path / "base.gguf"
    write_base(build(name), path, "f32")
    model = model_of(build(name))
    tokens: list[int] = model.base.tokenizer(PROMPT)["input_ids"]
    expected = log_probabilities(model, tokens)

    found = llama_log_probabilities(path, tokens)

    assert float((found - expected).abs().max()) < bound(name)
    assert found.argmax(-1).tolist() == expected.argmax(-1).tolist()


@pytest.mark.parametrize("name", MODELS)
def test_an_adapter_beside_the_base_gives_the_logits_of_peft(
    name: str, build: Build, tmp_path: Path
):
    base, adapter = tmp_path / "base.gguf", tmp_path / "adapter.gguf"
    write_base(build(name), base, "f32")
    plain = model_of(build(name))
    tokens: list[int] = plain.base.tokenizer(PROMPT)["input_ids"]
    without = log_probabilities(plain, tokens)
    model = model_of(build(name), AdapterSettings(rank=4, alpha=8.0, target_modules="all-linear"))
    expected = log_probabilities(model, tokens)
    write_adapter(write_peft(model, tmp_path / "peft"), build(name), adapter)

    found = llama_log_probabilities(base, tokens, adapter)

    assert float((expected - without).abs().mean()) > 0.1
    assert float((found - expected).abs().max()) < bound(name)


TRAINABLE = [name for name in MODELS if name not in ("llama3-rope", "qwen2-yarn")]


@pytest.mark.parametrize("name", TRAINABLE)
def test_a_gguf_base_is_the_model_that_it_was_written_of(name: str, build: Build, tmp_path: Path):
    path = tmp_path / "base.gguf"
    write_base(build(name), path, "f32")
    origin, model = model_of(build(name)), model_of(path)
    tokens: list[int] = origin.base.tokenizer(PROMPT)["input_ids"]

    assert model.base.tokenizer(PROMPT)["input_ids"] == tokens
    difference = log_probabilities(model, tokens) - log_probabilities(origin, tokens)
    assert float(difference.abs().max()) < 1e-5


@pytest.mark.parametrize("name", ["llama3-rope", "qwen2-yarn"])
def test_a_gguf_base_that_cannot_be_turned_back_exactly_is_not_trained_on(
    name: str, build: Build, tmp_path: Path
):
    path = tmp_path / "base.gguf"
    write_base(build(name), path, "f32")
    with pytest.raises(NotConvertible, match="cannot be trained on exactly"):
        model_of(path)


@pytest.mark.parametrize("part", ["q", "k"])
def test_without_the_change_of_rows_the_logits_would_be_others(
    part: str, build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "base.gguf"
    heads = {"q": 4, "k": 2}[part]
    right = architecture.permuted
    monkeypatch.setattr(
        architecture, "permuted", lambda rows, n: rows if n == heads else right(rows, n)
    )
    write_base(build("llama"), path, "f32")
    model = model_of(build("llama"))
    tokens: list[int] = model.base.tokenizer(PROMPT)["input_ids"]

    difference = llama_log_probabilities(path, tokens) - log_probabilities(model, tokens)

    assert float(difference.abs().max()) > 0.1


# Adapters


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # of peft 0.21
@pytest.mark.parametrize(
    "changes",
    [
        {"use_rslora": True},
        {"alpha_pattern": {"q_proj": 2.0, "layers.1.mlp.up_proj": 32.0}},
        {"use_rslora": True, "alpha_pattern": {"down_proj": 3.0}},
    ],
    ids=["rslora", "alphas", "both"],
)
def test_every_scale_of_peft_is_kept(changes: dict[str, Any], build: Build, tmp_path: Path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base, adapter = tmp_path / "base.gguf", tmp_path / "adapter.gguf"
    write_base(build("llama"), base, "f32")
    settings = AdapterSettings(rank=4, alpha=8.0, target_modules="all-linear")
    model = model_of(build("llama"), settings)
    tokens: list[int] = model.base.tokenizer(PROMPT)["input_ids"]
    peft = write_peft(model, tmp_path / "peft", **changes)
    write_adapter(peft, build("llama"), adapter)
    plain = AutoModelForCausalLM.from_pretrained(build("llama"))
    with torch.inference_mode():
        network: Any = PeftModel.from_pretrained(plain, str(peft)).eval()
        expected = network(torch.tensor([tokens])).logits[0].log_softmax(-1)

    found = llama_log_probabilities(base, tokens, adapter)

    assert float((found - expected).abs().max()) < EXACT
    assert float((log_probabilities(model, tokens) - expected).abs().max()) > 0.1


@pytest.mark.parametrize(
    "changes",
    [
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"bias": "lora_only"},
        {"lora_bias": True},
        {"peft_type": "LOHA"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_is_more_than_plain_lora_is_refused(
    changes: dict[str, Any], build: Build, tmp_path: Path
):
    peft = write_peft(model_of(build("llama")), tmp_path / "peft", **changes)
    with pytest.raises(NotConvertible, match="more than plain LoRA"):
        write_adapter(peft, build("llama"), tmp_path / "adapter.gguf")
    assert not (tmp_path / "adapter.gguf").exists()


def test_an_adapter_of_another_base_is_refused(build: Build, tmp_path: Path):
    peft = write_peft(model_of(build("llama")), tmp_path / "peft")
    other = tmp_path / "other.gguf"
    write_base(build("llama-biased"), other, "f16")
    for base in (build("llama-biased"), other):
        with pytest.raises(SchemaMismatch, match="belongs to base model"):
            write_adapter(peft, base, tmp_path / "adapter.gguf")
    assert not (tmp_path / "adapter.gguf").exists()


def test_an_adapter_fits_the_gguf_that_its_base_was_written_to(build: Build, tmp_path: Path):
    base, twice = tmp_path / "base.gguf", [tmp_path / "a.gguf", tmp_path / "b.gguf"]
    write_base(build("llama"), base, "q8_0")
    model = model_of(build("llama"))
    peft = write_peft(model, tmp_path / "peft")
    for path, origin in zip(twice, (build("llama"), base), strict=True):
        write_adapter(peft, origin, path, lineage="round 7")

    header = read_header(twice[0])
    assert twice[0].read_bytes() == twice[1].read_bytes()
    assert header.is_adapter
    assert header.fingerprint == model.base.fingerprint == read_header(base).fingerprint
    assert header.metadata["fedpeft.lineage"] == "round 7"


def test_a_damaged_adapter_is_refused(build: Build, tmp_path: Path):
    peft = write_peft(model_of(build("llama")), tmp_path / "peft")
    weights = peft / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(AdapterError, match="cannot be read"):
        write_adapter(peft, build("llama"), tmp_path / "adapter.gguf")


# Fewer bits


@pytest.fixture(scope="module")
def wide(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with rows of 256, the least that K-quants take, and one odd width."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {
        **SIZES,
        "hidden_size": 256,
        "intermediate_size": 288,
        "num_hidden_layers": 8,
        "initializer_range": 0.05,
        "tie_word_embeddings": True,
    }
    with torch.random.fork_rng():
        torch.manual_seed(5)
        network = LlamaForCausalLM(LlamaConfig(**sizes))
    directory = tmp_path_factory.mktemp("models") / "wide"
    network.save_pretrained(directory)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tiny_model / file, directory)
    return directory


# llama.cpp rounds activations to 8 bits where weights have 8 or fewer.
@pytest.mark.parametrize(
    ("quantisation", "bound"), [("f16", 2e-3), ("q8_0", 2e-2), ("q4_0", 2e-2), ("q4_k_m", 2e-2)]
)
def test_transformers_on_the_dequantised_weights_gives_nearly_the_same(
    quantisation: Quantisation, bound: float, wide: Path, tmp_path: Path
):
    path = tmp_path / "base.gguf"
    write_base(wide, path, quantisation)
    model = model_of(path)
    tokens: list[int] = model.base.tokenizer(PROMPT)["input_ids"]

    difference = llama_log_probabilities(path, tokens) - log_probabilities(model, tokens)

    assert float(difference.abs().mean()) < bound


def test_a_mixture_is_llama_cpps(wide: Path, tmp_path: Path):
    path = tmp_path / "base.gguf"
    write_base(wide, path, "q4_k_m")
    encodings = {name: it.encoding.name for name, it in read_header(path).tensors.items()}
    downs = [encodings[f"blk.{layer}.ffn_down.weight"] for layer in range(8)]
    values = [encodings[f"blk.{layer}.attn_v.weight"] for layer in range(8)]

    assert encodings["token_embd.weight"] == "Q6_K"  # the output layer too, as they are tied
    assert encodings["blk.0.attn_q.weight"] == "Q4_K"
    assert encodings["blk.0.attn_norm.weight"] == encodings["output_norm.weight"] == "F32"
    # More bits for the first eighth, the last, and every third between.
    more = [True, False, False, True, False, False, True, True]
    assert values == ["Q6_K" if each else "Q4_K" for each in more]
    # Rows of 288 are no multiple of 256.
    assert downs == ["Q8_0" if each else "Q5_0" for each in more]


def test_four_bits_of_bitsandbytes_on_a_gguf_base_are_those_on_its_origin(
    build: Build, tmp_path: Path
):
    path = tmp_path / "base.gguf"
    write_base(build("llama"), path, "f32")
    logits: list[torch.Tensor] = []
    for base in (build("llama"), path):
        loaded = load_base(base, quantization="nf4", dtype=torch.float32, device=CPU)
        with torch.inference_mode():
            logits.append(loaded.network(torch.tensor([[5, 9, 200, 31]])).logits)
    assert torch.equal(logits[0], logits[1])


# Text

TEXTS = [
    PROMPT,
    "  two  spaces,\ttab\n\n  and 1234567 mg; it's naïve — 日本語 😀 e\u0301",
    "<|user|>When?<|assistant|>At 8 o'clock.<eos>",
    "Once upon a time there was a 3-year-old girl.",
    "<|endoftext|> is a name that GPT-2 gave to a token.",
]


@pytest.mark.parametrize("model", ["tiny", "embedded", "stories260k"])
def test_llama_cpp_cuts_texts_into_the_tokens_of_training(
    model: str, tmp_path: Path, request: pytest.FixtureRequest
):
    if model == "stories260k":
        base = request.getfixturevalue("shared") / "models" / "stories260k"
    else:
        base = request.getfixturevalue(f"{model}_model")
    path = tmp_path / "base.gguf"
    write_base(base, path, "f16")
    tokenizer, rebuilt = load_tokenizer(base), load_tokenizer(path)

    with LlamaModel(path, context=32) as loaded:
        for text in TEXTS:
            expected = tokenizer(text)["input_ids"]
            assert loaded.tokenize(text, add_special=True) == expected
            assert model == "stories260k" or rebuilt(text)["input_ids"] == expected
    assert rebuilt.chat_template == tokenizer.chat_template
    assert rebuilt.eos_token_id == tokenizer.eos_token_id
    assert len(rebuilt) == len(tokenizer)
