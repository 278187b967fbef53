"""Speed and memory of local answers: our server, raw llama.cpp, transformers and bitsandbytes.

Ours is ``fedpeft-client serve`` on a box of its own, with the bare base model and with a
LoRA adapter beside it. Raw is the server of the xllamacpp wheel with its defaults on the
very same GGUF file. Both are asked over HTTP by the same client; transformers computes in
its own process. Each measurement has a process of its own, the contestants come in turn,
ratios are medians of the ratios within a turn. Every prompt is a new one, so that no cache
helps. Run it on a machine that does nothing else.

    python benchmarks/inference.py --model DIR
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

import httpx
import psutil
from report import bar, emit

QUANTISATIONS = ("q4_0", "q4_k_m")
PARALLEL, CONTEXT, CLINIC = 4, 1024, "bench"
_ANYWHERE = "--listen=127.0.0.1:0"
# As people start them: importing fedpeft here has set how long the threads of ours spin.
_PLAIN = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))}
_WORDS = ("patient", "tablet", "morning", "doctor", "fever", "rest", "water", "night", "dose")

Figures: TypeAlias = dict[str, float]


def main() -> None:
    """Run the contestants in turn and print the figures."""
    options = _options()
    if options.contestant:
        _contestant(options)
        return
    if not options.model.is_dir():
        sys.exit(f"inference: {options.model} is not here; name a model with --model")
    with tempfile.TemporaryDirectory() as folder:
        if options.large:
            options.model = _large(options.model, Path(folder) / "random-1.1b")
        boxes = {each: _box(Path(folder) / each, each, options) for each in QUANTISATIONS}
        contestants = _contestants(boxes, options)
        turns = [
            {name: _told(name, measure) for name, measure in contestants.items()}
            for _ in range(options.turns)
        ]
        swap = _told("swap", lambda: _swap(boxes["q4_k_m"], options))
    _report(options, turns, swap)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("../shared/models/stories260k"))
    parser.add_argument(
        "--large", action="store_true", help="random weights of 1.1B, with the model's tokenizer"
    )
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=160, help="words of a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--quick", action="store_true", help="one short turn: does it run?")
    parser.add_argument("--contestant", choices=("raw", "bf16", "nf4"))
    parser.add_argument("--file", type=Path)
    parser.add_argument("--adapter", type=Path)
    options = parser.parse_args()
    if options.quick:
        options.turns, options.tokens, options.prompt = 1, 16, 40
    return options


def _told(name: str, measure: Callable[[], Figures]) -> Figures:
    found = {key: round(value, 3) for key, value in measure().items()}
    print(f"{name}: {found}", file=sys.stderr)
    return found


def _contestants(
    boxes: dict[str, Path], options: argparse.Namespace
) -> dict[str, Callable[[], Figures]]:
    found: dict[str, Callable[[], Figures]] = {}
    for name, box in boxes.items():
        found[f"ours {name}"] = lambda box=box: _ours(box, "base", options)
        found[f"raw {name}"] = lambda box=box: _raw(box, options)
        found[f"ours {name} + lora"] = lambda box=box: _ours(box, CLINIC, options)
        found[f"raw {name} + lora"] = lambda box=box: _raw(box, options, lora=True)
    for name in ("bf16", "nf4"):
        found[f"transformers {name}"] = lambda name=name: _apart(name, options)
    return found


def _large(model: Path, directory: Path) -> Path:
    """Write a model of TinyLlama's shape; how fast it is does not depend on its weights."""
    import torch
    from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

    own = AutoConfig.from_pretrained(model)
    config = LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
        num_key_value_heads=4, vocab_size=own.vocab_size, max_position_embeddings=2048,
        bos_token_id=own.bos_token_id, eos_token_id=own.eos_token_id, dtype=torch.bfloat16,
    )  # fmt: skip
    network: Any = LlamaForCausalLM(config)
    network.to(torch.bfloat16).save_pretrained(directory)
    for path in [*model.glob("tokenizer*"), *model.glob("*.jinja")]:
        shutil.copy(path, directory)
    return directory


# A box with adapters of the model's own shape


def _box(directory: Path, quantisation: str, options: argparse.Namespace) -> Path:
    from fedpeft_client.inference.preparing import Apart
    from fedpeft_client.settings import (
        BoxModelSettings,
        ClientSettings,
        DataSettings,
        InferenceSettings,
        LimitSettings,
        ServerSettings,
        settings_toml,
    )

    directory.mkdir()
    settings = ClientSettings(
        clinic=CLINIC,
        server=ServerSettings(address="127.0.0.1:1", federation="bench"),
        model=BoxModelSettings(directory=options.model.resolve()),
        data=DataSettings(train=Path("none")),
        limits=LimitSettings(threads=options.threads),
        inference=InferenceSettings.model_validate(
            {"quantisation": quantisation, "context": CONTEXT, "parallel": PARALLEL,
             "engine": "llama.cpp"}
        ),
    )  # fmt: skip
    (directory / "client.toml").write_text(settings_toml(settings), "utf-8")
    _arrive(directory, 1, options.model)
    Apart(directory)()  # converts, so that load times are those of a second start
    return directory


def _arrive(directory: Path, number: int, model: Path) -> None:
    import torch

    from fedpeft.adapters import AdapterState
    from fedpeft.config import AdapterSettings
    from fedpeft.models import adapter_schema
    from fedpeft_client.versions.acceptance import Verdict
    from fedpeft_client.versions.store import AdapterStore
    from fedpeft_client.versions.version import Arrival

    lora = AdapterSettings(rank=8, alpha=16.0)
    schema = adapter_schema(model, lora)
    values = torch.randn(schema.numel, generator=torch.Generator().manual_seed(number)) * 0.01
    store = AdapterStore(directory / "adapters")
    arrival = Arrival(
        state=AdapterState(schema, values), settings=lora, base_name=model.name,
        federation="bench", run="1" * 32, round=number,
    )  # fmt: skip
    rival = store.in_use_name()
    store.keep(arrival, Verdict(accepted=True, reason="of the benchmark", rival=rival))


# Servers, and what a client sees of them


@contextlib.contextmanager
def _process(command: list[str], pattern: str) -> Generator[tuple[psutil.Process, str, float]]:
    """Start a server; yield it, its address and the seconds it took to be ready."""
    began = time.perf_counter()
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=_PLAIN) as server:
        try:
            assert server.stderr is not None  # for the type checker  # noqa: S101
            found = next((m for line in server.stderr if (m := re.search(pattern, line))), None)
            if found is None:
                sys.exit(f"inference: {command} ended before it was ready")
            threading.Thread(target=server.stderr.read, daemon=True).start()
            yield psutil.Process(server.pid), found[1], time.perf_counter() - began
        finally:
            server.terminate()


def _ours(box: Path, model: str, options: argparse.Namespace) -> Figures:
    command = [sys.executable, "-m", "fedpeft_client", "serve", str(box), _ANYWHERE]
    with _process(command, r" on (https?://\S+)/v1") as (process, url, ready):
        return _measure(url, model, process, options) | {"load_s": ready}


def _raw(box: Path, options: argparse.Namespace, *, lora: bool = False) -> Figures:
    inference = box / "inference"
    command = [sys.executable, __file__, "--contestant=raw", f"--threads={options.threads}",
               f"--file={next(inference.glob('base-*.gguf'))}"]  # fmt: skip
    if lora:
        command.append(f"--adapter={next((inference / 'adapters').glob('round-1-*.gguf'))}")
    with _process(command, r"^ready (\S+)") as (process, url, ready):
        return _measure(url, "raw", process, options) | {"load_s": ready}


def _measure(url: str, model: str, process: psutil.Process, options: argparse.Namespace) -> Figures:
    """Ask once to warm up, then alone three times, then four at once."""
    with _client(url) as client:
        _ask(client, model, options)
        alone = [_ask(client, model, options) for _ in range(1 if options.quick else 3)]
        began = time.perf_counter()
        with ThreadPoolExecutor(PARALLEL) as pool:
            together = list(pool.map(lambda _: _ask(client, model, options), range(PARALLEL)))
        seconds = time.perf_counter() - began
    whole = statistics.median(one["whole_s"] for one in alone)
    single = statistics.median(one["answer"] for one in alone) / whole
    return {
        "generation_tokens_per_s": statistics.median(one["generation"] for one in alone),
        "prompt_tokens_per_s": statistics.median(one["prompt"] for one in alone),
        "first_token_s": statistics.median(one["first_s"] for one in alone),
        "parallel_over_one": sum(one["answer"] for one in together) / seconds / single,
        "slowest_over_mean": max(one["whole_s"] for one in together)
        / statistics.mean(one["whole_s"] for one in together),
        "rss_mb": process.memory_info().rss / 2**20,
    }


def _client(url: str) -> httpx.Client:
    # llama.cpp's server closes a connection after some requests without saying so.
    limits = httpx.Limits(max_keepalive_connections=0)
    return httpx.Client(base_url=url, timeout=600, limits=limits)


_asked = iter(range(1, 1 << 30))


def _ask(client: httpx.Client, model: str, options: argparse.Namespace) -> Figures:
    number = next(_asked)
    words = (_WORDS[(number * 7 + at * (1 + number % 5)) % 9] for at in range(options.prompt))
    content = {
        "model": model, "prompt": f"{number}: {' '.join(words)}", "max_tokens": options.tokens,
        "temperature": 0, "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    began = time.perf_counter()
    first = last = 0.0
    usage: dict[str, int] = {}
    with client.stream("POST", "/v1/completions", json=content) as response:
        if response.status_code != 200:
            sys.exit(f"inference: {model} answered {response.read().decode()}")
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk: dict[str, Any] = json.loads(line.removeprefix("data: "))
            usage = chunk.get("usage") or usage
            if chunk.get("choices"):
                last = time.perf_counter()
                first = first or last
    answer = usage["completion_tokens"]
    return {
        "first_s": first - began,
        "whole_s": last - began,
        "answer": answer,
        "prompt": usage["prompt_tokens"] / (first - began),
        "generation": (answer - 1) / max(last - first, 1e-9),
    }


def _swap(box: Path, options: argparse.Namespace) -> Figures:
    """Seconds from a stored adapter to its first answer, while others are answered."""
    command = [sys.executable, "-m", "fedpeft_client", "serve", str(box), _ANYWHERE]
    with _process(command, r" on (https?://\S+)/v1") as (process, url, _):
        stop = threading.Event()
        with _client(url) as client:
            _ask(client, CLINIC, options)
            before = process.memory_info().rss

            def load() -> None:
                while not stop.is_set():
                    _ask(client, CLINIC, options)

            busy = threading.Thread(target=load)
            busy.start()
            _arrive(box, 2, options.model)
            began = time.perf_counter()
            wanted = {"model": CLINIC, "prompt": "x", "max_tokens": 1}
            while True:
                answer = client.post("/v1/completions", json=wanted).json()
                if answer["model"] == f"{CLINIC}@round-2":
                    break
            live = time.perf_counter() - began
            stop.set()
            busy.join()
            took: list[float] = []
            for name in ("base", f"{CLINIC}@round-1", f"{CLINIC}@round-2") * 4:
                began = time.perf_counter()
                client.post("/v1/completions", json=wanted | {"model": name})
                took.append(time.perf_counter() - began)
        grown = (process.memory_info().rss - before) / 2**20
    return {"live_s": live, "switch_s": statistics.median(took), "grown_mb": grown}


# The other contestants, each in its own process


def _contestant(options: argparse.Namespace) -> None:
    if options.contestant == "raw":
        _serve_raw(options)
    else:
        print(json.dumps(_transformers(options)))


def _serve_raw(options: argparse.Namespace) -> None:
    import xllamacpp

    library: Any = xllamacpp
    parameters = library.CommonParams()
    parameters.model.path = str(options.file)
    parameters.n_ctx, parameters.n_parallel = CONTEXT * 2, PARALLEL
    parameters.kv_unified = True
    parameters.cpuparams.n_threads = options.threads
    parameters.cpuparams_batch.n_threads = options.threads
    parameters.ui, parameters.port, parameters.verbosity = False, 0, 0
    if options.adapter:
        parameters.lora_adapters = [library.CommonAdapterLoraInfo(str(options.adapter), 1.0)]
    server = library.Server(parameters)
    print(f"ready {server.listening_address}", file=sys.stderr, flush=True)
    threading.Event().wait()


def _apart(name: str, options: argparse.Namespace) -> Figures:
    command = [sys.executable, __file__, f"--contestant={name}", f"--model={options.model}",
               f"--threads={options.threads}", f"--prompt={options.prompt}",
               f"--tokens={options.tokens}"]  # fmt: skip
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=_PLAIN)
    return json.loads(done.stdout.splitlines()[-1])


def _transformers(options: argparse.Namespace) -> Figures:
    import torch

    from fedpeft.models import load_base

    torch.set_num_threads(options.threads)
    began = time.perf_counter()
    base = load_base(
        options.model,
        quantization="nf4" if options.contestant == "nf4" else "none",
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )
    ready = time.perf_counter() - began
    network: Any = base.network.eval()
    tokenizer: Any = base.tokenizer
    text = " ".join(_WORDS[at % 9] for at in range(options.prompt))
    prompt = torch.tensor([tokenizer(text)["input_ids"]])
    with torch.inference_mode():
        network(input_ids=prompt[:, :4])
        began = time.perf_counter()
        out = network(input_ids=prompt, use_cache=True, logits_to_keep=1)
        first = time.perf_counter() - began
        began = time.perf_counter()
        for _ in range(options.tokens - 1):
            token = out.logits[:, -1:].argmax(-1)
            out = network(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        seconds = time.perf_counter() - began
    return {
        "generation_tokens_per_s": (options.tokens - 1) / seconds,
        "prompt_tokens_per_s": prompt.shape[1] / first,
        "first_token_s": first,
        "rss_mb": psutil.Process().memory_info().rss / 2**20,
        "load_s": ready,
    }


# What came of it


def _report(options: argparse.Namespace, turns: list[dict[str, Figures]], swap: Figures) -> None:
    def ratio(mine: str, other: str, figure: str) -> float:
        found = [turn[mine][figure] / turn[other][figure] for turn in turns]
        return round(statistics.median(found), 3)

    def worst(mine: str, other: str, figure: str, choose: Callable[..., float]) -> float:
        pairs = [(mine.format(q), other.format(q)) for q in QUANTISATIONS]
        return choose(ratio(*pair, figure) for pair in pairs)

    def median(name: str, figure: str) -> float:
        return round(statistics.median(turn[name][figure] for turn in turns), 3)

    speed = "generation_tokens_per_s"
    ours, raw = (f"{each} {QUANTISATIONS[1]}" for each in ("ours", "raw"))
    emit(
        "inference",
        {
            "model": options.model.name,
            "threads": options.threads,
            "turns": options.turns,
            "contestants": {
                name: {figure: median(name, figure) for figure in turns[0][name]}
                for name in turns[0]
            },
            "new_adapter": swap,
            "speed_over_raw_both_with_adapter": worst(
                "ours {} + lora", "raw {} + lora", speed, min
            ),
            "parallel_over_one_of_raw": median(raw, "parallel_over_one"),
        },
        {
            "speed_over_raw": bar(worst("ours {}", "raw {}", speed, min), ">=", 0.95),
            "speed_with_adapter_over_raw_without": bar(
                worst("ours {} + lora", "raw {}", speed, min), ">=", 0.85
            ),
            "speed_over_nf4": bar(ratio(ours, "transformers nf4", speed), ">=", 10),
            "memory_over_raw": bar(worst("ours {}", "raw {}", "rss_mb", max), "<=", 1.15),
            "parallel_over_one": bar(median(ours, "parallel_over_one"), ">=", 2),
            "slowest_over_mean_of_four": bar(median(ours, "slowest_over_mean"), "<=", 1.5),
            "new_adapter_live_s": bar(swap["live_s"], "<=", 5),
            "switch_s": bar(swap["switch_s"], "<=", 0.3),
        },
    )


if __name__ == "__main__":
    main()
