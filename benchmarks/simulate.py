"""A hundred virtual clinics on one machine: our local engine beside Flower's Ray engine.

The same ServerApp and ClientApp, the same clinics, one engine after the other in
processes of their own. Rounds per second leave out what comes before the first
round (imports, Ray's start); the whole run's seconds stand beside it. Memory is
the sum over the engine's processes, each page shared among them counted once.

    python benchmarks/simulate.py

The bars are about the engines, so the model is as small as one can be (one layer
of width 32, random): what is left is what an engine costs a clinic. ``--model
embedded`` shows both engines under the demo's model, where arithmetic counts
and Ray has the advantage of using every core.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
from report import bar, emit

ENGINES = ("local", "ray")


def main() -> None:
    """Run both engines in turn and print the figures."""
    options = _options()
    with tempfile.TemporaryDirectory() as place:
        config = _federation(Path(place), options)
        turns = [
            {engine: _run(engine, config, Path(place) / "out") for engine in ENGINES}
            for _ in range(options.turns)
        ]
    figures = {
        engine: {
            figure: round(statistics.median(turn[engine][figure] for turn in turns), 4)
            for figure in turns[0][engine]
        }
        for engine in ENGINES
    }
    faster = statistics.median(
        turn["local"]["rounds_per_s"] / turn["ray"]["rounds_per_s"] for turn in turns
    )
    leaner = statistics.median(
        turn["local"]["peak_memory_mb"] / turn["ray"]["peak_memory_mb"] for turn in turns
    )
    emit(
        "simulate",
        {**vars(options), **figures},
        {
            "rounds_per_s_over_ray": bar(round(faster, 2), ">=", 5.0),
            "memory_over_ray": bar(round(leaner, 3), "<=", 0.5),
        },
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clinics", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--model", choices=("minimal", "embedded"), default="minimal")
    return parser.parse_args()


def _federation(place: Path, options: argparse.Namespace) -> Path:
    """Deal the embedded federation's records out to many small clinics."""
    from fedpeft.data import read_records
    from fedpeft.demo.clinics import write_federation

    written = write_federation(place / "data")
    records = [record for clinic in written for record in read_records(clinic.train).records]
    lines = [
        f'name = "many"\n[model]\nbase = "{_base(place, options)}"\ndtype = "float32"\n',
        "[training]\nlocal_steps = 1\nbatch_size = 8\nmax_length = 96\nlearning_rate = 1e-3\n",
        f"[rounds]\ncount = {options.rounds}\n",
    ]
    for number in range(options.clinics):
        path = place / "data" / f"clinic-{number:03}.jsonl"
        rows = [
            {"messages": [{"role": turn.role, "content": turn.text} for turn in record.turns]}
            for record in records[number :: options.clinics]
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        lines.append(f'[[clinic]]\nname = "clinic-{number:03}"\ntrain = "{path}"\n')
    config = place / "federation.toml"
    config.write_text("".join(lines))
    return config


def _base(place: Path, options: argparse.Namespace) -> str:
    if options.model == "embedded":
        return "embedded"
    from transformers import AutoConfig, AutoModelForCausalLM

    from fedpeft.models import resolve_base

    embedded, minimal = resolve_base("embedded", relative_to=place), place / "minimal"
    shutil.copytree(embedded, minimal, ignore=shutil.ignore_patterns("*.safetensors"))
    config = AutoConfig.from_pretrained(embedded)
    config.update(
        {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 64, "head_dim": 16}
        | {"num_attention_heads": 2, "num_key_value_heads": 2}
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(minimal)
    return str(minimal)


def _run(engine: str, config: Path, out: Path) -> dict[str, float]:
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "fedpeft", "simulate", str(config), "--engine", engine]
    began = time.perf_counter()
    process = subprocess.Popen([*command, "--out", str(out)], stderr=subprocess.PIPE, text=True)
    peak: list[float] = [0.0]
    watcher = threading.Thread(target=_watch, args=(process.pid, peak), daemon=True)
    watcher.start()
    _, errors = process.communicate()
    seconds = time.perf_counter() - began
    if process.returncode:
        sys.exit(f"simulate: the engine {engine} failed:\n{errors}")
    rounds: list[dict[str, Any]] = json.loads((out / "summary.json").read_text())["rounds"]
    # The first round reads all data and loads the base, once for either engine.
    steady = [done["seconds"] for done in rounds[1:]]
    figures = {
        "rounds_per_s": len(steady) / sum(steady),
        "first_round_s": rounds[0]["seconds"],
        "whole_run_s": seconds,
        "peak_memory_mb": peak[0],
        "failed": float(sum(len(done["failed"]) for done in rounds)),
    }
    print(f"{engine}: {figures}", file=sys.stderr)
    return figures


def _watch(pid: int, peak: list[float]) -> None:
    """Keep the largest proportional memory of a process and its descendants, Ray's included."""
    try:
        root = psutil.Process(pid)
        while root.is_running() and root.status() != psutil.STATUS_ZOMBIE:
            total = 0
            for process in [root, *root.children(recursive=True)]:
                try:
                    total += process.memory_full_info().pss
                except (psutil.NoSuchProcess, psutil.AccessDenied):
                    continue
            peak[0] = max(peak[0], total / 1e6)
            time.sleep(0.2)
    except psutil.NoSuchProcess:
        pass


if __name__ == "__main__":
    main()
