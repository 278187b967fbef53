"""What 4 bits cost: llama.cpp on our GGUF files against transformers + PEFT.

Agreement: greedy answers to 50 of the clinics' validation questions, 64 tokens each, with the
LoRA beside the GGUF base, against transformers + PEFT on the weights of that same file. Loss:
perplexity on the clinics' validation answers by encoding, adapter beside the base or merged.

    python benchmarks/quantisation.py --model DIR --work runs/quantisation --write docs/inference.md

The embedded model is always measured, each ``--model`` beside it; the adapter of each is
trained shortly on the clinics' rows first. What is in the work folder is not made again.
"""

import argparse
import datetime
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quantisation_runs import (
    Subject,
    agreement,
    prepare,
    quality_of_gguf,
    quality_of_torch,
    quality_without,
)
from report import bar, emit, machine

from fedpeft.gguf_format import Quantisation
from fedpeft.models import resolve_base
from fedpeft.offline import enforce
from fedpeft_strategies.table import write_section

ENCODINGS: tuple[Quantisation, ...] = ("f16", "q8_0", "q4_0", "q4_k_m")
NAMES = {
    "f16": "f16",
    "q8_0": "Q8_0",
    "q4_0": "Q4_0",
    "q4_k_m": "Q4_K_M",
    "nf4": "NF4 (transformers)",
}
_SMALL_BYTES = 50_000_000
Figures = dict[str, dict[str, Any]]


def main() -> None:
    """Measure what is missing, and print and write all of it."""
    enforce()
    options = _options()
    torch.set_num_threads(options.threads)
    found: dict[str, tuple[Figures, Figures]] = {}
    for subject in _subjects(options):
        print(f"quantisation: {subject.name}", file=sys.stderr)
        prepare(subject)
        qualities = _qualities(subject)
        found[subject.name] = (_agreements(subject), qualities)
    if options.write is not None:
        write_section(options.write, "quality", _page(found))
    results = {name: {"agreement": a, "quality": q} for name, (a, q) in found.items()}
    emit("quantisation", results, dict(_bars(found)))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, action="append", default=[], help="a base directory")
    parser.add_argument("--data", type=Path, default=Path("../shared/data/clinics"))
    parser.add_argument("--work", type=Path, default=Path("runs/quantisation"))
    parser.add_argument("--write", type=Path, help="page for the tables")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=10, help="of training, of large models")
    return parser.parse_args()


def _subjects(options: argparse.Namespace) -> Iterator[Subject]:
    embedded = resolve_base("embedded", relative_to=Path())
    for base in [embedded, *(path.resolve() for path in options.model)]:
        name = "embedded" if base == embedded else base.name
        size = sum(path.stat().st_size for path in base.glob("*.safetensors"))
        small = size < _SMALL_BYTES
        yield Subject(
            name=name,
            base=base,
            work=options.work / name,
            data=options.data,
            steps=40 if small else options.steps,
            batch=4,
            length=128 if small else 96,
            threads=1 if small else options.threads,
        )


def _agreements(subject: Subject) -> Figures:
    found: Figures = {}
    for each in ENCODINGS:
        for unpacked in (False, True) if each != "f16" else (False,):
            key = f"{each} unpacked" if unpacked else each
            found[key] = subject.remembered(
                f"agreement {key}",
                lambda each=each, unpacked=unpacked: agreement(subject, each, unpacked=unpacked),
            )
    return found


def _qualities(subject: Subject) -> Figures:
    """Return perplexity, and loss and most likely tokens beside those of 32 bits with the LoRA."""
    whole = subject.remembered("f32", lambda: quality_of_torch(subject, "none", merged=False))
    found = {"base alone": subject.remembered("alone", lambda: quality_without(subject))}
    found["f32"] = whole
    for merged in (False, True):
        place = "merged" if merged else "beside"
        for each in ENCODINGS:
            found[f"{each} {place}"] = subject.remembered(
                f"{each} {place}",
                lambda each=each, merged=merged: quality_of_gguf(subject, each, merged=merged),
            )
        found[f"nf4 {place}"] = subject.remembered(
            f"nf4 {place}", lambda merged=merged: quality_of_torch(subject, "nf4", merged=merged)
        )
    return {key: _compared(one, whole) for key, one in found.items()}


def _compared(one: dict[str, Any], whole: dict[str, Any]) -> dict[str, Any]:
    losses, best = np.array(one["losses"]), np.array(whole["losses"])
    return {
        "tokens": len(losses),
        "perplexity": math.exp(losses.mean()),
        "more_loss": float((losses - best).mean()),
        "same_top": float((np.array(one["top"]) == np.array(whole["top"])).mean()),
    }


def _bars(found: dict[str, tuple[Figures, Figures]]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, (agreements, _) in found.items():
        for each, figures in agreements.items():
            yield f"{name} {each} identical", bar(figures["identical"], ">=", 0.95)
            yield f"{name} {each} difference", bar(figures["difference"], "<=", 1e-2)


def _page(found: dict[str, tuple[Figures, Figures]]) -> str:
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    lines = [
        f"Measured on {today}, {machine()}, with `python benchmarks/quantisation.py`.",
        "",
        "Agreement of llama.cpp with transformers + PEFT **on the weights of the same file**, "
        "LoRA beside the base: answers of which all tokens are the same, and the mean difference "
        "of a token's log-probability (nats). Beside quantised weights llama.cpp rounds the "
        "activations to 8 bits, which transformers does not; *unpacked* are the very same "
        "dequantised weights in a file of 32 bits, where it does not either, with attention in 32 "
        "bits too.",
        "",
    ]
    names = list(found)
    lines += [f"| encoding | {' | '.join(names)} |", f"| --- |{' --- |' * len(names)}"]
    for key in next(iter(found.values()))[0]:
        each, _, rest = key.partition(" ")
        ones = [agreements[key] for agreements, _ in found.values()]
        cells = [f"{one['identical']:.0%}, {one['difference']:.4f}" for one in ones]
        lines.append(f"| {NAMES[each]} {rest} | {' | '.join(cells)} |".replace("  ", " "))
    # Of the last model alone: the embedded one has never seen such text.
    name, (_, qualities) = list(found.items())[-1]
    lines += ["", *_loss_table(name, qualities)]
    return "\n".join(lines) + "\n"


def _loss_table(name: str, qualities: Figures) -> Iterator[str]:
    whole = qualities["f32"]
    alone = qualities["base alone"]["perplexity"]
    yield (
        f"Loss of going to fewer bits, {name}: perplexity on {whole['tokens']} tokens of the "
        f"clinics' validation answers. In 32 bits it is {alone:.3f} without the LoRA and "
        f"{whole['perplexity']:.3f} with it; behind it, nats a token more than that, and how often "
        "the most likely token is the same."
    )
    yield ""
    yield "| weights | LoRA beside the base | LoRA merged before |"
    yield "| --- | --- | --- |"
    for each in (*ENCODINGS, "nf4"):
        cells = [_cell(qualities[f"{each} {place}"]) for place in ("beside", "merged")]
        yield f"| {NAMES[each]} | {' | '.join(cells)} |"


def _cell(one: dict[str, Any]) -> str:
    return f"{one['perplexity']:.3f} ({one['more_loss']:+.3f}, {one['same_top']:.1%})"


if __name__ == "__main__":
    main()
