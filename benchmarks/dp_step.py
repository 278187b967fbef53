"""What privacy costs a training step: our DP step beside our plain one, and Opacus beside both.

The same logical batch on the same model, contestants in turn in one process, medians
of the ratios within a turn; peak memory of each contestant in a process of its own.
Opacus is used as it comes: GradSampleModule's hooks and its DPOptimizer. Where other
programs share the processor, trust the ratios of processor time over those of the clock.

    python benchmarks/dp_step.py [--model DIR]

Without ``--model`` the weights are random, in the shape of SmolLM2-135M: they do not
matter to time or memory. ``--model embedded`` is the demo's base model.
"""

import argparse
import json
import operator
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from report import bar, emit

CONTESTANTS = ("plain", "private", "opacus")
RANK, CLIP, NOISE = 8, 1.0, 1.0
Step = Callable[[], None]


class Seconds(NamedTuple):
    """What one step took, by the clock and of the processor."""

    clock: float
    processor: float


_CLOCK: Callable[[Seconds], float] = operator.attrgetter("clock")
_PROCESSOR: Callable[[Seconds], float] = operator.attrgetter("processor")


def main() -> None:
    """Run the contestants in turn and print the figures."""
    options = _options()
    if options.contestant:
        step = _contestant(options.contestant, options)
        for _ in range(2):
            step()
        print(json.dumps(_peak_mb()))
        return
    with tempfile.TemporaryDirectory() as place:
        if options.model is None:
            options.model = _random_model(Path(place) / "smollm2-135m-shape")
        memory = {name: _peak_of(name, options) for name in CONTESTANTS}
        seconds = _seconds(options)
    _report(options, seconds, memory)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=128, help="of the longest row, in tokens")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--contestant", choices=CONTESTANTS)
    return parser.parse_args()


def _report(
    options: argparse.Namespace, seconds: dict[str, list[Seconds]], memory: dict[str, float]
) -> None:
    def slower(name: str, of: Callable[[Seconds], float]) -> float:
        pairs = zip(seconds[name], seconds["plain"], strict=True)
        return round(statistics.median(of(one) / of(plain) for one, plain in pairs), 3)

    def median(of: Callable[[Seconds], float]) -> dict[str, float]:
        return {
            name: round(statistics.median(map(of, found)), 3) for name, found in seconds.items()
        }

    emit(
        "dp_step",
        {
            "model": options.model.name,
            "rows": options.rows,
            "length": options.length,
            "rank": RANK,
            "turns": options.turns,
            "seconds": median(_CLOCK),
            "processor_seconds": median(_PROCESSOR),
            "processor_time_ratio": slower("private", _PROCESSOR),
            "peak_mb": memory,
            "opacus_time_ratio": slower("opacus", _CLOCK),
            "opacus_processor_time_ratio": slower("opacus", _PROCESSOR),
            "opacus_memory_ratio": round(memory["opacus"] / memory["plain"], 3),
        },
        {
            "time_over_plain": bar(slower("private", _CLOCK), "<=", 1.25),
            "memory_over_plain": bar(round(memory["private"] / memory["plain"], 3), "<=", 1.3),
        },
    )


def _seconds(options: argparse.Namespace) -> dict[str, list[Seconds]]:
    steps = {name: _contestant(name, options) for name in CONTESTANTS}
    found: dict[str, list[Seconds]] = {name: [] for name in CONTESTANTS}
    for turn in range(options.turns + 1):
        for name, step in steps.items():
            clock, processor = time.perf_counter(), time.process_time()
            step()
            taken = Seconds(time.perf_counter() - clock, time.process_time() - processor)
            if turn:  # the first warms up
                found[name].append(taken)
                print(f"{name}: {taken}", file=sys.stderr)
    return found


def _peak_of(contestant: str, options: argparse.Namespace) -> float:
    arguments = [f"--{key}={getattr(options, key)}" for key in ("model", "rows", "length")]
    command = [sys.executable, __file__, *arguments, "--contestant", contestant]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def _peak_mb() -> float:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return round(torch.cuda.max_memory_allocated() / 2**20)
    from fedpeft_server.runs.directory import peak_rss_mb

    return round(peak_rss_mb())


def _random_model(directory: Path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    from fedpeft.models import resolve_base

    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(resolve_base("embedded", relative_to=Path()) / name, directory)
    return directory


def _contestant(name: str, options: argparse.Namespace) -> Step:
    """Return one optimiser step; each contestant has a model of its own."""
    from fedpeft.config import AdapterSettings, TrainingSettings
    from fedpeft.models import Workbench, initial_state, resolve_base

    model = Workbench().adapted(
        resolve_base(str(options.model), relative_to=Path()),
        AdapterSettings(rank=RANK),
        quantization="none",
        dtype="float32",
    )
    model.load(initial_state(model.schema, 0))
    rows = _rows(options, model.base.network.config.vocab_size)
    settings = TrainingSettings(batch_size=options.rows, local_steps=1)
    if name == "opacus":
        return _opacus(model, rows, settings)
    return _ours(model, rows, settings, private=name == "private")


def _rows(options: argparse.Namespace, words: int) -> list[Any]:
    import numpy as np

    from fedpeft.data import EncodedExample

    random = np.random.default_rng(0)
    lengths = random.integers(options.length // 2, options.length, options.rows)
    lengths[0] = options.length
    return [
        EncodedExample(
            random.integers(0, words, length).astype(np.int32),
            np.arange(length) >= length // 2,
            row,
            False,
            None,
        )
        for row, length in enumerate(lengths)
    ]


def _ours(model: Any, rows: list[Any], settings: Any, *, private: bool) -> Step:
    from fedpeft.privacy.noise import GaussianNoise
    from fedpeft.privacy.sampling import PoissonSampler
    from fedpeft.training import Place, PrivateRound
    from fedpeft.training.optimizer import build_optimizer
    from fedpeft.training.plain import PlainSteps
    from fedpeft.training.private import PrivateSteps

    start = model.weights.detach().clone()
    optimizer = build_optimizer(model.weights, settings)
    if private:
        access = PrivateRound(
            unit="record",
            clip=CLIP,
            records_per_patient=1,
            charge=lambda step: None,
            sampler=PoissonSampler(),
            noise_multiplier=NOISE,
            noise=GaussianNoise(),
        )
        steps = PrivateSteps(model, rows, settings, access, start)
    else:
        steps = PlainSteps(model, rows, settings, Place("clinic", 1, 1), start)
    model.train_mode(gradient_checkpointing=False)

    def step() -> None:
        steps.compute(1)
        optimizer.step()

    return step


def _opacus(model: Any, rows: list[Any], settings: Any) -> Step:
    import torch
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    from fedpeft.training import collate
    from fedpeft.training.steps import sequence_losses

    model.train_mode(gradient_checkpointing=False)
    sampled = GradSampleModule(model.base.network)
    factors = [p for p in model.base.network.parameters() if p.requires_grad]
    for factor in factors:
        factor.grad = None
    optimizer = DPOptimizer(
        torch.optim.AdamW(factors, lr=settings.learning_rate),
        noise_multiplier=NOISE,
        max_grad_norm=CLIP,
        expected_batch_size=len(rows),
    )

    def step() -> None:
        optimizer.zero_grad()
        sequence_losses(model, collate(rows, model.device)).mean().backward()
        optimizer.step()

    # Its hooks hang on the modules, which the model goes on calling; keep their owner alive.
    step.sampled = sampled  # pyright: ignore[reportFunctionMemberAccess]
    return step


if __name__ == "__main__":
    main()
