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

ENGINES = ("local", "ray", "ray-tuned")
"""``ray`` as Flower sets it up (two CPUs a client); ``ray-tuned`` with one, as fedpeft does."""


def main() -> None:
    """Run both engines in turn and print the figures."""
    options = _options()
    if options.contestant:
        _simulate(options.contestant, options.config, options.out)
        return
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
    settings = {key: getattr(options, key) for key in ("clinics", "rounds", "turns", "model")}
    emit(
        "simulate",
        {**settings, **figures},
        {
            "rounds_per_s_over_ray": bar(_ratio(turns, "rounds_per_s", "ray"), ">=", 5.0),
            "memory_over_ray": bar(_ratio(turns, "peak_memory_mb", "ray"), "<=", 0.5),
            "rounds_per_s_over_ray_tuned": bar(
                _ratio(turns, "rounds_per_s", "ray-tuned"), ">=", 5.0
            ),
            "memory_over_ray_tuned": bar(_ratio(turns, "peak_memory_mb", "ray-tuned"), "<=", 0.5),
        },
    )


def _ratio(turns: list[dict[str, dict[str, float]]], figure: str, peer: str) -> float:
    return round(statistics.median(turn["local"][figure] / turn[peer][figure] for turn in turns), 3)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clinics", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--contestant", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--config", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
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
        "[training]\nlocal_steps = 1\nbatch_size = 1\nmax_length = 96\nlearning_rate = 1e-3\n",
        # Of both engines, as the one of the peer cannot keep the secrets of secure aggregation.
        '[aggregation]\nconfidentiality = "sealed"\n',
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
    command = [sys.executable, __file__, "--contestant", engine, "--config", str(config)]
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


def _simulate(contestant: str, config: Path, out: Path) -> None:
    from fedpeft.simulation import ray as ray_engine
    from fedpeft.simulation.display import Display
    from fedpeft.simulation.plan import plan_simulation
    from fedpeft.simulation.run import simulate

    if contestant == "ray":
        ray_engine.CPUS_PER_CLINIC = 2  # Flower's default
    engine = "local" if contestant == "local" else "ray"
    simulation = plan_simulation(config, [], engine=engine, out=out)
    with Display().stage("many", rounds=1, clinics=1) as stage:
        simulate(simulation, stage)


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
