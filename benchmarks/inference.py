"""Speed and memory of local answers: our server, raw llama.cpp, transformers and bitsandbytes.

Ours is ``fedpeft-client serve`` on a box of its own, with the bare base model and with a
LoRA adapter beside it. Raw is the server of the xllamacpp wheel with its defaults on the
very same GGUF file. All of one encoding run at once, and one client asks them in turn over
HTTP, so that what slows the machine for some seconds slows all of them; who is not asked
sleeps. transformers computes in its own process, once a turn. Ratios are medians of the
ratios within such a round. Every prompt is a new one, so that no cache helps. Run it on a
machine that does nothing else.

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
from dataclasses import dataclass, replace
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
        turns: list[dict[str, Figures]] = [{} for _ in range(options.turns)]
        for name, box in boxes.items():
            for turn, found in zip(turns, _servers_in_turn(name, box, options), strict=True):
                turn.update(found)
        for turn in turns:
            for name in ("bf16", "nf4"):
                turn[f"transformers {name}"] = _told(name, _apart(name, options))
        swap = _told("swap", _swap(boxes["q4_k_m"], options))
    _report(options, turns, swap)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("../shared/models/stories260k"))
    parser.add_argument(
        "--large", action="store_true", help="random weights of 1.1B, with the model's tokenizer"
    )
    parser.add_argument("--turns", type=int, default=5)
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


def _told(name: str, measured: Figures) -> Figures:
    found = {key: round(value, 3) for key, value in measured.items()}
    print(f"{name}: {found}", file=sys.stderr)
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


@dataclass(frozen=True, kw_only=True)
class _Server:
    """A contestant that runs: how it is asked, and how soon it was ready (seconds)."""

    process: psutil.Process
    client: httpx.Client
    model: str
    load_s: float


def _servers_in_turn(name: str, box: Path, options: argparse.Namespace) -> list[dict[str, Figures]]:
    """Run ours and raw side by side on one encoding; return the figures of each turn."""
    serve = [sys.executable, "-m", "fedpeft_client", "serve", str(box), _ANYWHERE]
    ours, raw = (serve, r" on (https?://\S+)/v1"), r"^ready (\S+)"
    with contextlib.ExitStack() as running:

        def start(command: list[str], pattern: str, model: str) -> _Server:
            process, url, load_s = running.enter_context(_process(command, pattern))
            client = running.enter_context(_client(url))
            return _Server(process=process, client=client, model=model, load_s=load_s)

        both = start(*ours, CLINIC)
        servers = {
            f"ours {name}": replace(both, model="base"),
            f"raw {name}": start(_raw(box, options), raw, "raw"),
            f"ours {name} + lora": both,
            f"raw {name} + lora": start(_raw(box, options, lora=True), raw, "raw"),
        }
        for each in servers.values():
            _ask(each.client, each.model, options)
        return [_turn(servers, options) for _ in range(options.turns)]


def _turn(servers: dict[str, _Server], options: argparse.Namespace) -> dict[str, Figures]:
    """Ask each alone three times, one after the other, then each four at once."""
    alone: dict[str, list[Figures]] = {name: [] for name in servers}
    for _ in range(1 if options.quick else 3):
        for name, server in servers.items():
            alone[name].append(_ask(server.client, server.model, options))
    return {
        name: _told(name, _measured(server, alone[name], options))
        for name, server in servers.items()
    }


def _raw(box: Path, options: argparse.Namespace, *, lora: bool = False) -> list[str]:
    inference = box / "inference"
    command = [sys.executable, __file__, "--contestant=raw", f"--threads={options.threads}",
               f"--file={next(inference.glob('base-*.gguf'))}"]  # fmt: skip
    if lora:
        command.append(f"--adapter={next((inference / 'adapters').glob('round-1-*.gguf'))}")
    return command


def _measured(server: _Server, alone: list[Figures], options: argparse.Namespace) -> Figures:
    """Ask four at once, and return the figures of that and of those asked ``alone``."""
    began = time.perf_counter()
    with ThreadPoolExecutor(PARALLEL) as pool:
        together = list(
            pool.map(lambda _: _ask(server.client, server.model, options), range(PARALLEL))
        )
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
        "rss_mb": server.process.memory_info().rss / 2**20,
        "load_s": server.load_s,
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
