"""What ``quantisation.py`` measures of one model: agreement with transformers, and perplexity.

Everything is kept in a work folder; what is there is not made again.
"""

import functools
import gc
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import dequantize
from llama_logits import LlamaModel
from numpy.typing import NDArray
from peft import PeftModel
from transformers import AutoModelForCausalLM

from fedpeft.adapters import AdapterState, initial_state, save_adapter
from fedpeft.adapters.peft_directory import WEIGHTS_FILE, read_tensors
from fedpeft.config import AdapterSettings, Quantization, TrainingSettings
from fedpeft.data import EncodedExample, encode, read_records
from fedpeft.gguf_format import Quantisation, write_adapter, write_base
from fedpeft.models import AdaptedModel, load_base, load_tokenizer
from fedpeft.training import Place, train

CPU = torch.device("cpu")
LORA = AdapterSettings(rank=8, alpha=16.0, target_modules="all-linear")
PROMPTS, ANSWER = 50, 64
_ROWS_A_CLINIC = 1
_LONGEST = 256
"""Tokens of a validation row, and of a question with its answer."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model, its folder, and how long its adapter is trained on the clinics' rows."""

    name: str
    base: Path
    work: Path
    data: Path
    steps: int
    batch: int
    length: int
    threads: int

    @property
    def adapter(self) -> Path:
        """The trained adapter as PEFT writes it."""
        return self.work / "adapter"

    @property
    def lora(self) -> Path:
        """The trained adapter as GGUF."""
        return self.work / "adapter.gguf"

    @property
    def merged(self) -> Path:
        """A base model's directory with the adapter merged in."""
        return self.work / "merged"

    def gguf(self, quantisation: Quantisation, *, merged: bool = False) -> Path:
        """Return the GGUF file, written if it is not there."""
        path = self.work / f"{'merged-' if merged else ''}{quantisation}.gguf"
        if not path.exists():
            write_base(self.merged if merged else self.base, path, quantisation)
        return path

    def unpacked(self, quantisation: Quantisation) -> Path:
        """Return the weights of the GGUF file in 32 bits, written if that is not there.

        llama.cpp rounds activations to 8 bits beside quantised weights, and not beside these.
        """
        path = self.work / f"{quantisation}-unpacked.gguf"
        if not path.exists():
            _unpack(self.gguf(quantisation), path)
        return path

    def remembered(self, key: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return what was measured under ``key``, now or before."""
        path = self.work / "figures.json"
        figures: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        if key not in figures:
            figures[key] = measure()
            path.write_text(json.dumps(figures, indent=1))
            gc.collect()
        return figures[key]


def _unpack(source: Path, path: Path) -> None:
    reader = GGUFReader(source)
    half = path.with_suffix(".half")
    writer = GGUFWriter(half, str(reader.fields["general.architecture"].contents()))
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        writer.add_tensor(tensor.name, values.reshape(tensor.shape[::-1]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    half.rename(path)


def rows(subject: Subject, file: str, most: int, length: int) -> tuple[EncodedExample, ...]:
    """Return the first rows of every clinic's ``file`` (a stem), cut at ``length`` tokens."""
    return _rows(subject.base, subject.data, file, most, length)


@functools.cache
def _rows(base: Path, data: Path, file: str, most: int, length: int) -> tuple[EncodedExample, ...]:
    tokenizer = load_tokenizer(base)
    found: list[EncodedExample] = []
    for path in sorted(data.glob(f"*/{file}.*")):
        records = read_records(path, skip_bad_rows=True)
        few = replace(records, records=records.records[:most])
        found += encode(few, tokenizer, max_length=length).examples
    return tuple(row for row in found if row.targets.any())


def prepare(subject: Subject) -> None:
    """Train the adapter, and write it as GGUF and merged, where that is not done."""
    subject.work.mkdir(parents=True, exist_ok=True)
    if not (subject.adapter / WEIGHTS_FILE).exists():
        base = load_base(subject.base, quantization="none", dtype=torch.float32, device=CPU)
        model = AdaptedModel(base, LORA)
        model.load(initial_state(model.schema, 0))
        settings = TrainingSettings(
            learning_rate=2e-3,
            batch_size=subject.batch,
            local_steps=subject.steps,
            max_length=subject.length,
            schedule="cosine",
        )
        examples = rows(subject, "train", 30, subject.length)
        train(model, examples, settings, Place("all", 1, 1))
        save_adapter(model.read(), LORA, subject.adapter, base_name=subject.name)
    if not subject.lora.exists():
        write_adapter(subject.adapter, subject.base, subject.lora)
    if not subject.merged.exists():
        plain = AutoModelForCausalLM.from_pretrained(subject.base, dtype=torch.float32)
        merged = cast("Any", PeftModel.from_pretrained(plain, str(subject.adapter)))
        half = subject.work / "merged.half"
        merged.merge_and_unload().save_pretrained(half)
        for path in [*subject.base.glob("tokenizer*"), *subject.base.glob("*.jinja")]:
            shutil.copy(path, half)
        half.rename(subject.merged)


def adapted(subject: Subject, base: Path, quantization: Quantization = "none") -> AdaptedModel:
    """Return transformers + PEFT with the trained adapter on the weights in ``base``."""
    loaded = load_base(base, quantization=quantization, dtype=torch.float32, device=CPU)
    model = AdaptedModel(loaded, LORA)
    tensors = read_tensors(subject.adapter / WEIGHTS_FILE, "train it again")
    model.load(AdapterState.from_tensors(tensors, model.schema))
    model.eval_mode()
    return model


def torch_log_probabilities(network: Any, tokens: Sequence[int]) -> NDArray[np.float32]:
    """Return what transformers gives after each token, shape (tokens, vocabulary)."""
    with torch.inference_mode():
        logits = network(torch.tensor([list(tokens)])).logits[0].float()
    return logits.log_softmax(-1).numpy()


def llama_log_probabilities(model: LlamaModel, tokens: Sequence[int]) -> NDArray[np.float32]:
    """Return what llama.cpp gives after each token, shape (tokens, vocabulary)."""
    return torch.from_numpy(model.logits(tokens)).log_softmax(-1).numpy()


def agreement(
    subject: Subject, quantisation: Quantisation, *, unpacked: bool = False
) -> dict[str, Any]:
    """Compare greedy answers with transformers + PEFT on the same dequantised weights.

    llama.cpp reads the quantised file, or its weights ``unpacked`` to 32 bits, in which it
    computes attention too then.

    llama.cpp answers; transformers reads the prompt and that answer. It would have given the
    same answer if, and only if, each token is the most likely one after those before it.
    """
    base = subject.gguf(quantisation)
    prompts = _prompts(subject, _LONGEST // 4)
    reference = adapted(subject, base)
    stop = [cast("int", cast("Any", reference.base.tokenizer).eos_token_id)]
    same: list[bool] = []
    differences: list[float] = []
    file = subject.unpacked(quantisation) if unpacked else base
    with LlamaModel(
        file, adapter=subject.lora, context=_LONGEST, exact=unpacked, threads=subject.threads
    ) as model:
        for prompt in prompts:
            answer = model.greedy(prompt, ANSWER, stop)
            tokens, begin = [*prompt, *answer], len(prompt) - 1
            ours = llama_log_probabilities(model, tokens)[begin:-1]
            theirs = torch_log_probabilities(reference.base.network, tokens)[begin:-1]
            at = (np.arange(len(answer)), np.array(answer))
            same.append(bool((theirs.argmax(-1) == at[1]).all()))
            differences += np.abs(ours[at] - theirs[at]).tolist()
    return {
        "prompts": len(prompts),
        "tokens": len(differences),
        "identical": float(np.mean(same)),
        "difference": float(np.mean(differences)),
    }


def _prompts(subject: Subject, most: int) -> list[list[int]]:
    """Return the clinics' validation questions, of long ones the last ``most`` tokens."""
    found = rows(subject, "valid", -(-PROMPTS // 10), 2048)[:PROMPTS]
    return [row.input_ids[: int(row.targets.argmax())].tolist()[-most:] for row in found]


Read = Callable[[Sequence[int]], NDArray[np.float32]]


def quality(subject: Subject, read: Read) -> dict[str, Any]:
    """Return losses (nats) and most likely tokens at the answers of the validation rows."""
    losses: list[float] = []
    top: list[int] = []
    for row in rows(subject, "valid", _ROWS_A_CLINIC, _LONGEST):
        tokens = row.input_ids.tolist()
        found = read(tokens)[:-1]
        places = np.flatnonzero(row.targets[1:])
        wanted = row.input_ids[1:][places]
        losses += (-found[places, wanted]).tolist()
        top += found[places].argmax(-1).tolist()
    return {"losses": losses, "top": top}


def quality_of_gguf(
    subject: Subject, quantisation: Quantisation, *, merged: bool
) -> dict[str, Any]:
    """Measure a GGUF file, with the adapter beside it or merged before it was quantised."""
    path = subject.gguf(quantisation, merged=merged)
    adapter = None if merged else subject.lora
    with LlamaModel(path, adapter=adapter, context=_LONGEST, threads=subject.threads) as model:
        return quality(subject, lambda tokens: llama_log_probabilities(model, tokens))


def quality_of_torch(
    subject: Subject, quantization: Quantization, *, merged: bool
) -> dict[str, Any]:
    """Measure transformers + PEFT on the full or the NF4 weights."""
    if merged:
        loaded = load_base(
            subject.merged, quantization=quantization, dtype=torch.float32, device=CPU
        )
        network = loaded.network.eval()
    else:
        network = adapted(subject, subject.base, quantization).base.network
    return quality(subject, lambda tokens: torch_log_probabilities(network, tokens))


def quality_without(subject: Subject) -> dict[str, Any]:
    """Measure the base model alone, in 32 bits."""
    loaded = load_base(subject.base, quantization="none", dtype=torch.float32, device=CPU)
    network = loaded.network.eval()
    return quality(subject, lambda tokens: torch_log_probabilities(network, tokens))
