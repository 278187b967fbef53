"""Tokens/s and peak memory of our training loop beside transformers.Trainer + PEFT.

Same model, same rows, same batch size, same optimiser, one epoch each; every
measurement in a process of its own, the contestants in turn, medians of the
ratios within a turn. Tokens count without padding.

    python benchmarks/train_step.py --model DIR --data FILE

The rows are the first ``--rows`` of the file, cut at ``--max-length`` tokens.
A model with rotary positions reads rows beyond its trained context as fast as
any others, so the length may exceed it here: this measures speed, not quality.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from report import bar, emit

CONTESTANTS = ("trainer", "ours", "ours-bucketed")
RANK, BATCH, RATE = 8, 8, 1e-3


def main() -> None:
    """Run the contestants in turn and print the figures."""
    options = _options()
    if options.contestant:
        print(json.dumps(_measure(options)))
        return
    if not options.data.is_file() or not options.model.is_dir():
        sys.exit(f"train_step: {options.data} or {options.model} is not here; name --data, --model")
    turns = [
        {name: _in_process(name, options) for name in CONTESTANTS} for _ in range(options.turns)
    ]
    speed = {name: _median(turns, name, "tokens_per_s") for name in CONTESTANTS}
    memory = {name: _median(turns, name, "peak_rss_mb") for name in CONTESTANTS}
    plain = _ratio(turns, "ours")
    bucketed = _ratio(turns, "ours-bucketed")
    emit(
        "train_step",
        {
            "model": options.model.name,
            "data": f"{options.data.parent.name}/{options.data.name}",
            "rows": options.rows,
            "max_length": options.max_length,
            "turns": options.turns,
            "tokens_per_s": speed,
            "peak_rss_mb": memory,
            "final_loss": {name: _median(turns, name, "loss") for name in CONTESTANTS},
        },
        {
            "speed_over_trainer": bar(plain, ">=", 1.0),
            "speed_over_trainer_bucketed": bar(bucketed, ">=", 1.3),
        },
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("../shared/models/stories260k"))
    parser.add_argument(
        "--data", type=Path, default=Path("../shared/data/clinics/gard/train.jsonl")
    )
    parser.add_argument("--rows", type=int, default=320)
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--contestant", choices=CONTESTANTS)
    return parser.parse_args()


def _in_process(contestant: str, options: argparse.Namespace) -> dict[str, float]:
    arguments = [f"--{key.replace('_', '-')}={value}" for key, value in vars(options).items()
                 if key not in ("contestant", "turns")]  # fmt: skip
    command = [sys.executable, __file__, *arguments, "--contestant", contestant]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"{contestant}: {found}", file=sys.stderr)
    return found


def _median(turns: list[dict[str, dict[str, float]]], name: str, figure: str) -> float:
    return round(statistics.median(turn[name][figure] for turn in turns), 3)


def _ratio(turns: list[dict[str, dict[str, float]]], name: str) -> float:
    ratios = [turn[name]["tokens_per_s"] / turn["trainer"]["tokens_per_s"] for turn in turns]
    return round(statistics.median(ratios), 3)


def _measure(options: argparse.Namespace) -> dict[str, float]:
    from fedpeft.data import encode, read_records
    from fedpeft.models import load_tokenizer
    from fedpeft_server.runs.directory import peak_rss_mb

    tokenizer = load_tokenizer(options.model)
    encoded = encode(read_records(options.data), tokenizer, max_length=options.max_length)
    examples = encoded.examples[: options.rows]
    tokens = sum(len(example.input_ids) for example in examples)
    run = _trainer if options.contestant == "trainer" else _ours
    seconds, loss = run(options, examples)
    return {"tokens_per_s": tokens / seconds, "loss": loss, "peak_rss_mb": peak_rss_mb()}


def _ours(options: argparse.Namespace, examples: Any) -> tuple[float, float]:
    from fedpeft.config import AdapterSettings, TrainingSettings
    from fedpeft.models import Workbench, initial_state
    from fedpeft.training import Place, train

    model = Workbench().adapted(
        options.model, AdapterSettings(rank=RANK), quantization="none", dtype="float32"
    )
    model.load(initial_state(model.schema, 0))
    settings = TrainingSettings(
        learning_rate=RATE,
        batch_size=BATCH,
        local_epochs=1,
        max_length=options.max_length,
        bucket_by_length=options.contestant == "ours-bucketed",
    )
    train(model, examples[:BATCH], settings, Place("warm-up", 1, 1))
    model.load(initial_state(model.schema, 0))
    began = time.perf_counter()
    result = train(model, examples, settings, Place("clinic", 1, 1))
    return time.perf_counter() - began, result.loss


def _trainer(options: argparse.Namespace, examples: Any) -> tuple[float, float]:
    import tempfile

    import numpy as np
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    from fedpeft.adapters import lora_config
    from fedpeft.config import AdapterSettings

    base = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    model = get_peft_model(base, lora_config(AdapterSettings(rank=RANK)))

    def labels(row: Any) -> list[int]:
        return np.where(row.targets, row.input_ids, -100).tolist()

    rows = [{"input_ids": row.input_ids.tolist(), "labels": labels(row)} for row in examples]

    def pad(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in batch)
        fill = {"input_ids": 0, "labels": -100}
        padded = {
            key: torch.tensor(
                [[*row[key], *[fill[key]] * (longest - len(row[key]))] for row in batch]
            )
            for key in fill
        }
        lengths = torch.tensor([len(row["input_ids"]) for row in batch])
        padded["attention_mask"] = (torch.arange(longest) < lengths[:, None]).long()
        return padded

    def trainer(data: list[dict[str, Any]]) -> Trainer:
        return Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=place,
                per_device_train_batch_size=BATCH,
                num_train_epochs=1,
                learning_rate=RATE,
                lr_scheduler_type="constant",
                optim="adamw_torch_fused",
                max_grad_norm=1.0,
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                dataloader_pin_memory=False,
            ),
            train_dataset=data,  # pyright: ignore[reportArgumentType]
            data_collator=pad,
        )

    with tempfile.TemporaryDirectory() as place:
        trainer(rows[:BATCH]).train()
        measured = trainer(rows)
        began = time.perf_counter()
        result = measured.train()
        return time.perf_counter() - began, result.training_loss


if __name__ == "__main__":
    main()
