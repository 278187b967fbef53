"""The adapted model as an ONNX graph, made by torch's own exporter and run by onnxruntime.

One graph without a key-value cache: token ids and attention mask of any number of rows
and tokens go in, logits come out.
"""

import importlib.util
import logging
import warnings
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import PreTrainedModel

from fedpeft.errors import ConfigError, ModelError
from fedpeft_client.export.companions import copy_licence, copy_tokenizer
from fedpeft_client.export.folder import require_space
from fedpeft_client.export.merging import merge
from fedpeft_client.export.probes import Answer, compare
from fedpeft_client.export.record import Written
from fedpeft_client.export.source import Source

if TYPE_CHECKING:
    from torch.onnx import ONNXProgram

OPSET = 20
"""The operator set of the graph: the newest that torch 2.9 to 2.13 writes without converting."""
MODEL_FILE = "model.onnx"
"""The graph; the weights lie beside it in ``model.onnx.data``."""
INPUTS = ("input_ids", "attention_mask")
OUTPUT = "logits"
_LIBRARIES = ("onnx", "onnxscript", "onnxruntime")


def write(source: Source, folder: Path, say: Callable[[str], None]) -> Written:
    """Write the adapted model into ``folder``, and compare it with the adapter beside the base.

    Raises:
        ConfigError: the libraries of the extra ``onnx`` are not installed.
        ModelError: the base model cannot be loaded, is quantised, or has no ONNX form.
        ExportDiffers: onnxruntime answers otherwise than PyTorch.
        StorageError, OSError: the disk is full, or the folder cannot be written.
    """
    _require_libraries()
    say("loading the base model in full precision and adding the adapter to it")
    merged = merge(source)
    require_space(folder, merged.bytes, "the ONNX model")
    say("tracing the model; this can take minutes")
    program = trace(merged.network)
    say(f"writing {merged.bytes >> 20} MiB of weights")
    program.save(folder / MODEL_FILE, external_data=True)
    merged.network.config.save_pretrained(folder)
    copy_tokenizer(source.base, merged.tokenizer, merged.embeddings, folder)
    copy_licence(source.base, folder)
    say("comparing onnxruntime's answers with the adapted model's")
    check = compare(
        "the ONNX model in onnxruntime", _answers_of(folder / MODEL_FILE), merged.expected
    )
    return Written(checks=(check,), details={"dtype": "float32", "opset": OPSET})


def _require_libraries() -> None:
    missing = [name for name in _LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"the ONNX export needs {', '.join(missing)}, which is not installed; run "
            "`pip install 'fedpeft[onnx]'` or export in another format"
        )


class _Logits(torch.nn.Module):
    """A causal language model reduced to what the graph computes."""

    def __init__(self, network: PreTrainedModel) -> None:
        super().__init__()
        self.network = network

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.network(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False
        ).logits


def trace(network: PreTrainedModel) -> "ONNXProgram":
    """Return ``network`` as an ONNX program whose rows and tokens are open.

    Raises:
        ModelError: the exporter cannot express the architecture.
    """
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    # Two tensors: of one and the same the exporter would make one input in secret.
    tokens, mask = (torch.ones((2, 7), dtype=torch.int64) for _ in INPUTS)
    with _quiet():
        try:
            program = torch.onnx.export(
                _Logits(network).eval(),
                (tokens, mask),
                dynamo=True,
                input_names=list(INPUTS),
                output_names=[OUTPUT],
                dynamic_shapes=dict.fromkeys(INPUTS, axes),
                opset_version=OPSET,
                verbose=False,
            )
        except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
            raise ModelError(
                f"{type(network).__name__} cannot be written as ONNX ({type(error).__name__}); "
                "export with --format merged or gguf"
            ) from error
    assert program is not None  # noqa: S101 - so it is with dynamo=True
    _forget_where(program)
    return program


@contextmanager
def _quiet() -> Generator[None]:
    """Keep back the exporter's remarks to its own developers."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # Inside torch 2.13 itself.
            warnings.filterwarnings("ignore", ".*LeafSpec.*", FutureWarning)
            # Both inputs have the same axes, and the names are those of the first.
            warnings.filterwarnings("ignore", ".*axis name.*will not be used.*", UserWarning)
            yield
    finally:
        log.setLevel(level)


def _forget_where(program: "ONNXProgram") -> None:
    """Take out the remarks on each node, which hold the paths of this machine's files."""
    graph = cast("Any", program.model.graph)
    graph.metadata_props.clear()
    for value in (*graph.inputs, *graph.initializers.values()):
        value.metadata_props.clear()
    for node in cast("Iterable[Any]", graph.all_nodes()):
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()


def _answers_of(path: Path) -> Answer:
    """Return onnxruntime's logits as a function of token ids, without padding."""
    import onnxruntime  # an extra

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def answer(tokens: torch.Tensor) -> torch.Tensor:
        feed = {"input_ids": tokens.numpy(), "attention_mask": torch.ones_like(tokens).numpy()}
        (logits,) = session.run([OUTPUT], feed)
        return torch.from_numpy(logits)

    return answer
