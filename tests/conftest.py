"""Fixtures for all tests: a tiny base model, the embedded one, made-up rows, real data if here."""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from fedpeft.data import EncodedExample
    from fedpeft.models import AdaptedModel

# Before torch is imported, and for child processes too: the tests share few cores.
os.environ["OMP_NUM_THREADS"] = "1"

# How long an example takes tells of what else the machine does, not of the code.
settings.register_profile("fedpeft", deadline=None)
settings.load_profile("fedpeft")

_SENTENCES = (
    "The patient asks when to take the tablets; take one tablet in the morning.",
    "How long should I rest after the operation? Rest for two weeks and walk a little.",
    "What does a high temperature mean? It often means that the body fights an infection.",
    "Can I drive after the anaesthetic? No, do not drive for one day.",
)
_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MakeRows = Callable[..., "list[EncodedExample]"]
MakeModel = Callable[..., "AdaptedModel"]


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:  # pyright: ignore[reportUnusedFunction]
    """Keep the cache of fingerprints out of the home of whoever runs the tests."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a random Llama of 2 layers with a chat tokenizer; do not write to it."""
    from fedpeft.offline import enforce

    enforce()
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<pad>", "<eos>", "<|system|>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_SENTENCES, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        extra_special_tokens=special[2:],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = _TEMPLATE
    with torch.random.fork_rng():
        torch.manual_seed(11)
        network = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=320,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=128,
                initializer_range=0.2,
                bos_token_id=None,
                eos_token_id=1,
                pad_token_id=0,
                tie_word_embeddings=False,
            )
        )
    directory = tmp_path_factory.mktemp("models") / "tiny"
    network.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def tiny_copy(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    import shutil

    return Path(shutil.copytree(tiny_model, tmp_path / "copy"))


@pytest.fixture(scope="module")
def flower_identity() -> Iterator[None]:
    """Let messages be built outside a Flower run: Flower stamps them with the process's task."""
    from fedpeft.offline import enforce

    enforce()
    from flwr.supercore.task_identity import TaskIdentity

    kept = dict(vars(TaskIdentity))
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    yield
    for name in ("_task_id", "_run_id", "_node_id"):
        setattr(TaskIdentity, name, kept[name])


@pytest.fixture(scope="session")
def embedded_model() -> Path:
    """Directory of the embedded demo model."""
    from fedpeft.models import resolve_base

    return resolve_base("embedded", relative_to=Path())


@pytest.fixture(scope="session")
def shared() -> Path:
    """Where real clinic data lies beside the repository."""
    path = Path(__file__).parents[1].parent / "shared"
    if not path.is_dir():
        pytest.skip("real clinic data (../shared) is not here")
    return path


@pytest.fixture
def make_model(tiny_model: Path) -> MakeModel:
    """Build an adapted tiny model: ``make_model(settings, quantization=, dtype=, noise=)``.

    ``noise`` fills the adapter with normal values of that size, so that both factors matter.
    """
    import torch

    from fedpeft.adapters import AdapterState
    from fedpeft.config import AdapterSettings, Quantization
    from fedpeft.models import AdaptedModel, initial_state, load_base

    def make(
        settings: AdapterSettings = AdapterSettings(rank=4, alpha=8.0),  # noqa: B008  (frozen)
        *,
        quantization: Quantization = "none",
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        noise: float = 0.0,
    ) -> AdaptedModel:
        base = load_base(
            tiny_model, quantization=quantization, dtype=dtype, device=torch.device(device)
        )
        model = AdaptedModel(base, settings)
        model.load(initial_state(model.schema, 0))
        if noise:
            generator = torch.Generator().manual_seed(3)
            values = torch.randn(model.schema.numel, generator=generator) * noise
            model.load(AdapterState(model.schema, values))
        return model

    return make


@pytest.fixture
def make_rows() -> MakeRows:
    """Make up encoded rows of the given lengths, the last half of each a target."""
    import numpy as np

    from fedpeft.data import EncodedExample

    def make(
        lengths: Sequence[int], *, seed: int = 0, vocabulary: int = 320
    ) -> list[EncodedExample]:
        random = np.random.default_rng(seed)
        rows: list[EncodedExample] = []
        for number, length in enumerate(lengths):
            ids = random.integers(5, vocabulary, length).astype(np.int32)
            targets = np.arange(length) >= max(1, length // 2)
            rows.append(EncodedExample(ids, targets, number + 1, False, None))
        return rows

    return make
