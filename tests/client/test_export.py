"""Exports: what is refused, and that other tools load them and answer as the adapted model."""

import importlib
import json
import resource
import shutil
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast, get_args

import pytest
import torch
from typer.testing import CliRunner

from fedpeft.adapters import AdapterState, load_adapter, save_adapter
from fedpeft.config import AdapterSettings
from fedpeft.errors import (
    AdapterError,
    ConfigError,
    ExportDiffers,
    ModelError,
    NotFinite,
    SchemaMismatch,
    StorageError,
    UnknownAdapter,
)
from fedpeft.gguf_format import Quantisation, write_base
from fedpeft.models import adapter_schema
from fedpeft.sealing.identity import Identity
from fedpeft_client.commands.export import app
from fedpeft_client.export import as_onnx, folder
from fedpeft_client.export.exporting import export
from fedpeft_client.export.folder import new_folder, require_space
from fedpeft_client.export.formats import Format
from fedpeft_client.export.probes import BOUND, Expectation, compare
from fedpeft_client.export.source import Source, open_source
from fedpeft_client.settings import (
    BoxModelSettings,
    ClientSettings,
    DataSettings,
    ServerSettings,
    settings_toml,
)
from fedpeft_client.versions.acceptance import Verdict
from fedpeft_client.versions.store import AdapterStore
from fedpeft_client.versions.version import Arrival

# peft 0.21 reads an attribute that transformers 5.23 calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
SETTINGS = AdapterSettings(rank=4, alpha=8.0)
LINEAGE = b'{"made": "of rounds"}\n'
TEXT = "Can I take ibuprofen with blood thinners? No, call the ward first."
Exported = Callable[..., Path]


def silent(_: str) -> None:
    """Take a sentence for people."""


def write_adapter(directory: Path, base: Path, settings: AdapterSettings = SETTINGS) -> Path:
    """Write an adapter of noise that changes most answers of ``base``."""
    schema = adapter_schema(base, settings)
    values = torch.randn(schema.numel, generator=torch.Generator().manual_seed(5)) * 0.08
    save_adapter(AdapterState(schema, values), settings, directory, base_name=str(base))
    return directory


@pytest.fixture(scope="module")
def adapter(embedded_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the embedded model, with a lineage; do not write to it."""
    directory = write_adapter(tmp_path_factory.mktemp("adapters") / "round-7", embedded_model)
    (directory / "lineage.json").write_bytes(LINEAGE)
    return directory


@pytest.fixture
def copied(adapter: Path, tmp_path: Path) -> Path:
    """A copy of the adapter that a test may damage."""
    return Path(shutil.copytree(adapter, tmp_path / "copied"))


@pytest.fixture(scope="module")
def source(adapter: Path, embedded_model: Path) -> Source:
    return open_source(adapter, embedded_model, name="round-7")


@pytest.fixture(scope="module")
def trace() -> Callable[[Any], Any]:
    """Trace the adapted model at the first call only: that takes most of an ONNX export's time."""
    programs: list[Any] = []
    first = as_onnx.trace

    def once(network: Any) -> Any:
        if not programs:
            programs.append(first(network))
        return programs[0]

    return once


@pytest.fixture
def traced_once(trace: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let all ONNX exports, which are of the same model, trace it once."""
    monkeypatch.setattr(as_onnx, "trace", trace)


@pytest.fixture(scope="module")
def exported(
    source: Source, trace: Callable[[Any], Any], tmp_path_factory: pytest.TempPathFactory
) -> Exported:
    """Export once a module: ``exported(format, quantisation)``; do not write to the folder."""
    made: dict[tuple[Format, Quantisation], Path] = {}
    parent = tmp_path_factory.mktemp("exports")

    def make(form: Format, quantisation: Quantisation = "f16") -> Path:
        key = (form, quantisation)
        if key not in made:
            out = parent / f"{form.value}-{quantisation}"
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(as_onnx, "trace", trace)
                export(source, form, out, say=silent, quantisation=quantisation)
            made[key] = out
        return made[key]

    return make


@pytest.fixture(scope="module")
def adapted(adapter: Path, embedded_model: Path) -> Any:
    """The adapted model as PEFT itself puts it together, in float32."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(embedded_model, dtype=torch.float32)
    return PeftModel.from_pretrained(base, adapter).eval()


@pytest.fixture(scope="module")
def tokenizer(embedded_model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(embedded_model)


@torch.no_grad()
def logits(network: Any, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    return network(input_ids=tokens, attention_mask=mask, use_cache=False).logits


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.isfinite().all()
    assert float((found - expected).abs().max()) < BOUND


def random_tokens(*shape: int) -> torch.Tensor:
    return torch.randint(3, 1280, shape, generator=torch.Generator().manual_seed(shape[-1]))


# What is refused


@pytest.mark.parametrize(
    "arguments",
    [
        ["--format", "pickle"],
        ["--format", "gguf", "--quantisation", "q3"],
        ["--format", "merged", "--quantisation", "q8_0"],
        [],
    ],
    ids=["format", "quantisation", "quantisation of another format", "no format"],
)
def test_a_wrong_command_line_is_refused(arguments: list[str], tmp_path: Path):
    result = CliRunner().invoke(app, [str(tmp_path), "--out", str(tmp_path / "out"), *arguments])

    assert result.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_the_help_names_every_format_and_quantisation():
    text = CliRunner().invoke(app, ["--help"]).stdout

    assert [name for name in (*Format, *get_args(Quantisation)) if name not in text] == []


def test_a_folder_that_holds_something_is_refused_and_left_as_it_was(
    source: Source, tmp_path: Path
):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")

    with pytest.raises(StorageError, match="is not empty"):
        export(source, Format.peft, tmp_path / "out", say=silent)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "thesis.txt"]


def test_a_file_in_place_of_the_folder_is_refused_and_left_as_it_was(
    source: Source, tmp_path: Path
):
    (tmp_path / "out").write_text("mine")

    with pytest.raises(StorageError, match="is a file"):
        export(source, Format.peft, tmp_path / "out", say=silent)
    assert (tmp_path / "out").read_text() == "mine"


def test_a_whole_disk_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "stick").mkdir()
    monkeypatch.setattr(folder.os.path, "ismount", lambda path: path == tmp_path / "stick")

    with pytest.raises(StorageError, match="is a whole disk"), new_folder(tmp_path / "stick"):
        pytest.fail("the body must not begin")


def test_an_adapter_of_another_base_model_is_refused(
    adapter: Path, embedded_model: Path, tmp_path: Path
):
    other = Path(shutil.copytree(embedded_model, tmp_path / "other"))
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "model.safetensors").write_bytes(weights)

    with pytest.raises(SchemaMismatch, match="belongs to base model"):
        open_source(adapter, other, name="x")


def test_an_adapter_of_other_shapes_is_refused(copied: Path, tiny_model: Path):
    (copied / "fedpeft.json").unlink()

    with pytest.raises(SchemaMismatch):
        open_source(copied, tiny_model, name="x")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("kept", [None, 0, 40])
def test_a_damaged_adapter_is_refused(
    copied: Path, embedded_model: Path, name: str, kept: int | None
):
    data = (copied / name).read_bytes()
    (copied / name).unlink()
    if kept is not None:
        (copied / name).write_bytes(data[:kept])

    with pytest.raises(AdapterError):
        open_source(copied, embedded_model, name="x")


def test_an_adapter_that_is_not_finite_is_refused(
    source: Source, embedded_model: Path, tmp_path: Path
):
    values = source.state.values.clone()
    values[17] = float("nan")
    broken = AdapterState(source.state.schema, values)
    save_adapter(broken, SETTINGS, tmp_path / "broken", base_name="base")

    with pytest.raises(NotFinite):
        open_source(tmp_path / "broken", embedded_model, name="x")


@pytest.mark.parametrize("form", [Format.merged, Format.gguf, Format.onnx])
def test_a_quantised_base_model_is_not_merged(
    form: Format, adapter: Path, embedded_model: Path, tmp_path: Path
):
    base = Path(shutil.copytree(embedded_model, tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps(config))
    source = open_source(adapter, base, name="x")

    with pytest.raises(ModelError, match="full precision from the full-precision base model"):
        export(source, form, tmp_path / "out", say=silent)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_too_little_space_is_told_before_the_work(tmp_path: Path):
    with pytest.raises(StorageError, match=r"the merged model needs about \d+ MiB"):
        require_space(tmp_path, 2**60, "the merged model")


@contextmanager
def full_disk(most: int) -> Generator[None]:
    """Let no file grow beyond ``most`` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("most", [100, 50_000])
@pytest.mark.parametrize("form", Format)
@pytest.mark.usefixtures("traced_once")
def test_a_full_disk_leaves_nothing(form: Format, most: int, source: Source, tmp_path: Path):
    with full_disk(most), pytest.raises(StorageError, match="space") as refused:
        export(source, form, tmp_path / "out", say=silent)

    assert f"cannot write {tmp_path / 'out'}" in str(refused.value)
    assert "/." not in str(refused.value)  # no hidden folder, which nobody asked for
    assert "oserror" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("traced_once")
def test_weights_that_do_not_fit_on_the_disk_are_told_in_words(source: Source, tmp_path: Path):
    with full_disk(1 << 20), pytest.raises(StorageError) as refused:
        export(source, Format.onnx, tmp_path / "out", say=silent)

    assert f"cannot write {tmp_path / 'out'}: a file could not be written in full" in str(
        refused.value
    )


def test_a_missing_library_is_named_before_the_work(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "onnxscript", cast("Any", None))

    with pytest.raises(ConfigError, match=r"needs onnxscript.*pip install 'fedpeft\[onnx\]'"):
        export(source, Format.onnx, tmp_path / "out", say=silent)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [2e-3, float("nan"), float("inf")])
def test_an_export_that_answers_otherwise_is_refused(error: float):
    expected = Expectation(random_tokens(1, 5), torch.randn(1, 5, 9) * 3)
    wrong = expected.logits.clone()
    wrong[0, 4, 8] += error

    with pytest.raises(ExportDiffers):
        compare("the export", lambda _: wrong, [expected])
    assert compare("the export", lambda _: expected.logits, [expected]).largest_difference == 0


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_an_adapter_whose_lineage_cannot_be_read_is_refused(
    copied: Path, embedded_model: Path, content: bytes | None
):
    (copied / "lineage.json").unlink()
    if content is None:
        (copied / "lineage.json").mkdir()
    else:
        (copied / "lineage.json").write_bytes(content)

    with pytest.raises(AdapterError, match="lineage"):
        open_source(copied, embedded_model, name="x")


@pytest.mark.parametrize("form", Format)
@pytest.mark.usefixtures("traced_once")
def test_an_export_that_is_stopped_leaves_nothing(form: Format, source: Source, tmp_path: Path):
    def stop(_: str) -> None:
        if any(path.is_file() for path in tmp_path.rglob("*")) or form in (
            Format.peft,
            Format.gguf_lora,
        ):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(source, form, tmp_path / "out", say=stop)
    assert list(tmp_path.iterdir()) == []


# What every export carries


@pytest.mark.parametrize("form", Format)
def test_every_export_carries_its_record_and_lineage(
    form: Format, exported: Exported, source: Source
):
    out = exported(form)
    record = json.loads((out / "export.json").read_text())

    assert (out / "lineage.json").read_bytes() == LINEAGE
    assert record["schema"] == 1
    assert record["format"] == form.value
    assert record["base"]["fingerprint"] == source.fingerprint
    assert record["adapter"] == {"name": "round-7", "sha256": source.digest}
    assert record["checks"]
    assert record.get("opset") == (as_onnx.OPSET if form is Format.onnx else None)
    assert record.get("quantisation") == ("f16" if form is Format.gguf else None)
    assert [path.name for path in out.iterdir() if path.name.startswith(".")] == []
    assert out.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("form", Format)
def test_no_export_names_a_path_of_this_machine(
    form: Format, exported: Exported, adapter: Path, embedded_model: Path
):
    here = [str(embedded_model.parent), str(adapter.parent), "site-packages", "fedpeft_client/"]
    found = [
        (path.name, name)
        for path in exported(form).iterdir()
        for name in here
        if name.encode() in path.read_bytes()
    ]

    assert found == []


@pytest.mark.parametrize("form", [Format.peft, Format.merged, Format.gguf, Format.gguf_lora])
def test_the_same_adapter_gives_the_same_bytes(
    form: Format, exported: Exported, source: Source, tmp_path: Path
):
    export(source, form, tmp_path / "again", say=silent)

    assert contents(tmp_path / "again") == contents(exported(form))


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


# Other tools


def test_peft_loads_the_adapter(exported: Exported, adapted: Any, embedded_model: Path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(embedded_model, dtype=torch.float32)
    tokens = random_tokens(2, 40)
    without = logits(base.eval(), tokens)
    loaded = PeftModel.from_pretrained(base, exported(Format.peft)).eval()

    assert torch.equal(logits(loaded, tokens), logits(adapted, tokens))
    assert float((without - logits(loaded, tokens)).abs().max()) > 1


def test_transformers_loads_the_merged_model(exported: Exported, adapted: Any):
    from transformers import AutoModelForCausalLM

    merged = AutoModelForCausalLM.from_pretrained(exported(Format.merged)).eval()

    assert merged.dtype == torch.float32
    assert merged.config.use_cache
    for shape in ((1, 1), (3, 17), (1, 256)):
        tokens = random_tokens(*shape)
        assert_close(logits(merged, tokens), logits(adapted, tokens))


@pytest.mark.parametrize("form", [Format.merged, Format.onnx])
def test_the_tokenizer_and_chat_template_go_with_the_weights(
    form: Format, exported: Exported, tokenizer: Any
):
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(exported(form))
    turn = [{"role": "user", "content": TEXT}]

    assert loaded(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]
    assert loaded.apply_chat_template(turn) == tokenizer.apply_chat_template(turn)


# PEFT's advice to whoever would merge such an adapter with it.
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning")
def test_a_head_that_shares_the_embeddings_gets_weights_of_its_own(
    embedded_model: Path, tmp_path: Path
):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    settings = AdapterSettings(rank=2, alpha=4.0, target_modules=("lm_head", "q_proj"))
    adapter = write_adapter(tmp_path / "adapter", embedded_model, settings)
    export(
        open_source(adapter, embedded_model, name="x"),
        Format.merged,
        tmp_path / "out",
        say=silent,
    )
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    base = AutoModelForCausalLM.from_pretrained(embedded_model, dtype=torch.float32)
    tokens = random_tokens(2, 30)

    assert_close(
        logits(merged, tokens), logits(PeftModel.from_pretrained(base, adapter).eval(), tokens)
    )


def test_the_licence_of_the_base_model_goes_with_its_weights(
    adapter: Path, embedded_model: Path, tmp_path: Path
):
    base = Path(shutil.copytree(embedded_model, tmp_path / "base"))
    (base / "LICENSE.txt").write_text("keep this with the weights")
    source = open_source(adapter, base, name="x")

    for form, carried in ((Format.merged, True), (Format.gguf, True), (Format.peft, False)):
        export(source, form, tmp_path / form.value, say=silent)
        assert (tmp_path / form.value / "LICENSE.txt").exists() is carried


@pytest.fixture(scope="module")
def session(exported: Exported) -> Any:
    import onnxruntime

    return onnxruntime.InferenceSession(exported(Format.onnx) / "model.onnx")


def run(session: Any, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    feed = {"input_ids": tokens.numpy(), "attention_mask": mask.numpy()}
    return torch.from_numpy(session.run(["logits"], feed)[0])


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (5, 3), (2, 64), (1, 256)])
def test_onnxruntime_answers_as_pytorch_at_every_length(
    shape: tuple[int, int], session: Any, adapted: Any
):
    tokens = random_tokens(*shape)

    assert_close(run(session, tokens, torch.ones_like(tokens)), logits(adapted, tokens))


def test_onnxruntime_answers_as_pytorch_on_text_padded_on_either_side(
    session: Any, adapted: Any, tokenizer: Any
):
    lines = [TEXT, TEXT[:20], "What is the dose of Amoril?"]
    for side in ("left", "right"):
        tokenizer.padding_side = side
        batch = tokenizer(lines, return_tensors="pt", padding=True)
        tokens, mask = batch["input_ids"], batch["attention_mask"]
        real = mask.bool()
        assert not real.all()
        found = run(session, tokens, mask)
        assert_close(found[real], logits(adapted, tokens, mask)[real])


def test_onnxruntime_answers_as_pytorch_on_clinics_records(
    session: Any, adapted: Any, tokenizer: Any, shared: Path
):
    files = sorted((shared / "data" / "clinics").rglob("*.jsonl"))[:3]
    assert files
    for path in files:
        lines = path.read_text("utf-8").splitlines()[:4]
        for line in lines:
            tokens = torch.tensor([tokenizer(line)["input_ids"][:256]])
            assert_close(run(session, tokens, torch.ones_like(tokens)), logits(adapted, tokens))


def test_the_onnx_graph_is_valid_and_of_the_stated_opset(exported: Exported):
    import onnx

    path = exported(Format.onnx) / "model.onnx"
    onnx.checker.check_model(str(path), full_check=True)
    graph = onnx.load(path, load_external_data=False)
    opsets = {each.domain: each.version for each in graph.opset_import}
    axes = {
        each.name: [axis.dim_param for axis in each.type.tensor_type.shape.dim]
        for each in graph.graph.input
    }

    assert opsets[""] == as_onnx.OPSET
    assert axes == {name: ["batch", "sequence"] for name in as_onnx.INPUTS}


def test_llama_cpps_own_reader_finds_the_merged_model(exported: Exported):
    from gguf import GGUFReader

    reader = GGUFReader(exported(Format.gguf) / "model.gguf")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}

    assert field(reader, "general.architecture") == "llama"
    assert field(reader, "general.type") == "model"
    assert "assistant" in field(reader, "tokenizer.chat_template")
    assert kinds["blk.3.attn_q.weight"] == "F16"
    assert len(kinds) == 9 * 4 + 2


def test_llama_cpps_own_reader_finds_the_adapter(exported: Exported, source: Source):
    from gguf import GGUFReader

    reader = GGUFReader(exported(Format.gguf_lora) / "adapter.gguf")
    names = {tensor.name for tensor in reader.tensors}

    assert field(reader, "general.type") == "adapter"
    assert field(reader, "adapter.type") == "lora"
    assert field(reader, "adapter.lora.alpha") == SETTINGS.alpha
    assert field(reader, "fedpeft.lineage") == LINEAGE.decode()
    assert len(names) == len(source.state.schema.tensors)


def field(reader: Any, name: str) -> Any:
    return reader.get_field(name).contents()


def llama_server(model: Path, adapter: Path | None = None) -> Any:
    """Start llama.cpp's server as the wheel has it, without a word; it ends when let go of."""
    xllamacpp: Any = importlib.import_module("xllamacpp")  # has no types
    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.n_ctx, params.n_parallel, params.warmup = 256, 1, False
    params.cpuparams.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.verbosity, params.ui, params.port = -1, False, 0
    if adapter is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    return xllamacpp.Server(params)


def largest_gap(server: Any, network: Any, tokens: list[int]) -> float:
    """Let llama.cpp answer, and compare its probabilities (in nats) with those of ``network``."""
    asked = {"prompt": tokens, "n_predict": 24, "temperature": 0.0, "n_probs": 5}
    steps = server.handle_completions(asked)["choices"][0]["logprobs"]["content"]
    answer = [step["id"] for step in steps]
    scores = logits(network, torch.tensor([tokens + answer]))[0, len(tokens) - 1 : -1]
    expected = scores.log_softmax(-1)
    assert answer == expected.argmax(-1).tolist()
    return max(
        abs(float(expected[at, one["id"]]) - one["logprob"])
        for at, step in enumerate(steps)
        for one in step["top_logprobs"]
    )


PROMPTS = (TEXT, "What is", "The dose of Amoril for a child of 30 kg is")


@pytest.mark.parametrize(("quantisation", "bound"), [("f32", 1e-3), ("f16", 2e-2)])
def test_llama_cpp_answers_as_the_adapted_model_when_merged(
    quantisation: Quantisation, bound: float, exported: Exported, adapted: Any, tokenizer: Any
):
    server = llama_server(exported(Format.gguf, quantisation) / "model.gguf")

    for prompt in PROMPTS:
        assert largest_gap(server, adapted, tokenizer(prompt)["input_ids"]) < bound


def test_llama_cpp_answers_as_the_adapted_model_with_the_adapter_beside_the_base(
    exported: Exported, adapted: Any, tokenizer: Any, embedded_model: Path, tmp_path: Path
):
    write_base(embedded_model, tmp_path / "base.gguf", "f32")
    server = llama_server(tmp_path / "base.gguf", exported(Format.gguf_lora) / "adapter.gguf")

    for prompt in PROMPTS:
        assert largest_gap(server, adapted, tokenizer(prompt)["input_ids"]) < 1e-3


@pytest.mark.parametrize("quantisation", get_args(Quantisation))
def test_every_quantisation_that_the_command_offers_is_run_by_llama_cpp(
    quantisation: Quantisation, exported: Exported, tokenizer: Any
):
    server = llama_server(exported(Format.gguf, quantisation) / "model.gguf")
    asked = {"prompt": tokenizer(TEXT)["input_ids"], "n_predict": 4, "ignore_eos": True}

    assert server.handle_completions(asked)["usage"]["completion_tokens"] == 4


# From a base model that is a GGUF file


@pytest.fixture(scope="module")
def gguf_source(embedded_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Source:
    """An adapter of noise on the embedded model as GGUF in 32 bits."""
    directory = tmp_path_factory.mktemp("gguf")
    base = directory / "base.gguf"
    write_base(embedded_model, base, "f32")
    return open_source(write_adapter(directory / "round-7", base), base, name="round-7")


def test_transformers_loads_what_was_merged_into_a_gguf_base(
    gguf_source: Source, adapted: Any, tokenizer: Any, tmp_path: Path
):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    export(gguf_source, Format.merged, tmp_path / "out", say=silent)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokens = random_tokens(2, 40)

    # The same noise, on the same weights.
    assert_close(logits(merged, tokens), logits(adapted, tokens))
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]


def test_llama_cpp_runs_both_exports_of_a_gguf_base(
    gguf_source: Source, adapted: Any, tokenizer: Any, tmp_path: Path
):
    export(gguf_source, Format.gguf, tmp_path / "whole", say=silent, quantisation="f32")
    export(gguf_source, Format.gguf_lora, tmp_path / "lora", say=silent)
    tokens = tokenizer(TEXT)["input_ids"]

    whole = llama_server(tmp_path / "whole" / "model.gguf")
    assert largest_gap(whole, adapted, tokens) < 1e-3
    beside = llama_server(gguf_source.base, tmp_path / "lora" / "adapter.gguf")
    assert largest_gap(beside, adapted, tokens) < 1e-3


# From a clinic's box


@pytest.fixture
def box(source: Source, embedded_model: Path, tmp_path: Path) -> Path:
    """A box whose adapter in use came in round 7, after another in round 6."""
    directory = tmp_path / "box"
    directory.mkdir(mode=0o700)
    settings = ClientSettings(
        clinic="anna",
        server=ServerSettings(address="localhost:1", federation="heart"),
        model=BoxModelSettings(directory=embedded_model),
        data=DataSettings(train=Path("train.jsonl")),
    )
    (directory / "client.toml").write_text(settings_toml(settings))
    (directory / "server.identity").write_text(Identity.generate().public.to_text() + "\n")
    (directory / "identity.key").touch()
    store = AdapterStore(directory / "adapters")
    for number, values in ((6, source.state.values * 0.5), (7, source.state.values)):
        arrival = Arrival(
            state=AdapterState(source.state.schema, values),
            settings=SETTINGS,
            base_name="base",
            federation="heart",
            run="1" * 32,
            round=number,
            lineage=LINEAGE,
        )
        store.keep(arrival, Verdict(accepted=True, reason="better", rival=store.in_use_name()))
    return directory


def command(box: Path, out: Path, *arguments: str) -> Any:
    return CliRunner().invoke(app, [str(box), "--out", str(out), *arguments])


def test_an_unknown_adapter_is_refused(box: Path, tmp_path: Path):
    result = command(box, tmp_path / "out", "--format", "peft", "--adapter", "round-9")

    assert isinstance(result.exception, UnknownAdapter)
    assert not (tmp_path / "out").exists()


def test_the_adapter_in_use_is_exported_unless_another_is_named(
    box: Path, tmp_path: Path, source: Source
):
    for out, names, scale in (("a", (), 1.0), ("b", ("--adapter", "round-6"), 0.5)):
        result = command(box, tmp_path / out, "--format", "peft", *names)
        assert result.exit_code == 0, result.exception
        found = load_adapter(tmp_path / out, source.state.schema)
        assert torch.equal(found.values, source.state.values * scale)
        assert (tmp_path / out / "lineage.json").read_bytes() == LINEAGE


def test_the_command_says_what_it_does_and_keeps_stdout_clean(box: Path, tmp_path: Path):
    result = command(box, tmp_path / "out", "--format", "gguf", "--quantisation", "q8_0")

    assert result.exit_code == 0, result.exception
    assert result.stdout == ""
    assert "converting to GGUF (q8_0)" in result.stderr
    assert json.loads((tmp_path / "out" / "export.json").read_text())["quantisation"] == "q8_0"
