"""Averaging the adapters of an 8 B Llama: speed beside NumPy's add and Flower, and memory.

Ten clinics send rank 16 on all linear layers of Llama-3.1-8B, 42 M parameters in float16.
The updates come as wire bytes, one after the other, and are folded as they come. All
contestants take turns in one process; seconds are medians of a round of updates, ratios
are medians of each turn's ratio. Memory is that of a process of its own: the most that
it held, over what it held before the first update, the arriving bytes included. An
adapter is counted as float32 values, 4 bytes a parameter, unless it says wire.

- ``fold``: read the wire bytes and add; ``fold_only`` adds what was read before,
  ``fold_one_thread`` is ``fold`` on one thread, ``fold_checked`` also looks for NaN.
- ``fold_float32``: ``fold`` of as many bytes that are float32, of rank 8.
- ``numpy_add``: ``a += b`` in float32 over the same bytes; NumPy uses one thread.
- ``numpy_widening_add``: ``a += b`` over as many parameters, b in float16, a in float32.
- ``round``: ``fold`` from a new sum to the mean in float16.
- ``flower``: the same with what FedAvg of Flower calls on all replies at once; it sums in
  the dtype that came.

A float16 parameter costs a fold 10 bytes of memory traffic (read 2, read and write 4),
and the add over the same bytes 6: with one update at a time and memory as the limit the
fold has 0.6 of the add's speed, if both use as many threads. ``traffic_over_numpy_add``
compares the bytes that are moved on one thread. torch's threads wait for each other:
where other programs hold the cores, ``fold`` says nothing, ``fold_one_thread`` does.

    python benchmarks/aggregate.py
"""

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords
from report import bar, emit

from fedpeft.adapters import (
    DTYPES,
    AdapterSchema,
    AdapterState,
    TensorSpec,
    WeightedMean,
    from_bytes,
    to_bytes,
)
from fedpeft.adapters.wire import HEADER_BYTES

LAYERS, RANK = 32, 16
HIDDEN, KEYS, INNER = 4096, 1024, 14336
MODULES = {
    "mlp.down_proj": (INNER, HIDDEN),
    "mlp.gate_proj": (HIDDEN, INNER),
    "mlp.up_proj": (HIDDEN, INNER),
    "self_attn.k_proj": (HIDDEN, KEYS),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (HIDDEN, KEYS),
}
"""Inputs and outputs of Llama-3.1-8B's linear layers."""
TRAFFIC_OF_FOLD, TRAFFIC_OF_ADD = 2 + 4 + 4, 3 * 2
"""Bytes moved for each float16 parameter that arrives, and for as many bytes of float32."""
MANY = 100


def main() -> None:
    """Measure speed and memory and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--clinics", type=int, default=10)
    options = parser.parse_args()
    schema = llama_schema("float16")
    with tempfile.TemporaryDirectory() as place:
        update = Path(place) / "update"
        update.write_bytes(_wire(schema))
        few = _apart(ours_peak, update, options.clinics)
        many = _apart(ours_peak, update, MANY)
        checked = _apart(ours_checked_peak, update, options.clinics)
        flower = _apart(flower_peak, update, options.clinics)
    seconds = _interleaved(_contestants(schema, options.clinics), options.turns)
    adapter, wire = 4 * schema.numel, schema.itemsize * schema.numel
    emit(
        "aggregate",
        {
            "parameters": schema.numel,
            "clinics": options.clinics,
            "turns": options.turns,
            "threads": torch.get_num_threads(),
            "seconds": {name: round(statistics.median(s), 4) for name, s in seconds.items()},
            "update_gb_per_s": {
                name: round(options.clinics * wire / statistics.median(taken) / 1e9, 2)
                for name, taken in seconds.items()
            },
            "speed_over_numpy_add": {
                name: _faster(seconds, name, "numpy_add")
                for name in seconds
                if name.startswith("fold")
            },
            "traffic_over_numpy_add": round(
                _faster(seconds, "fold_one_thread", "numpy_add") * TRAFFIC_OF_FOLD / TRAFFIC_OF_ADD,
                3,
            ),
            "fold_over_numpy_widening_add": _faster(seconds, "fold", "numpy_widening_add"),
            "round_over_flower": _faster(seconds, "round", "flower"),
            "peak_wire_adapters": round(few / wire, 3),
            f"peak_wire_adapters_n{MANY}": round(many / wire, 3),
            "peak_adapters_checked": round(checked / adapter, 3),
            "flower_peak_adapters": round(flower / adapter, 3),
        },
        {
            "peak_adapters": bar(round(few / adapter, 3), "<=", 2.0),
            f"peak_adapters_n{MANY}": bar(round(many / adapter, 3), "<=", 2.0),
            "fold_over_numpy_add": bar(_faster(seconds, "fold", "numpy_add"), ">=", 0.6),
        },
    )


def llama_schema(dtype: str) -> AdapterSchema:
    """Return the schema of an adapter on all linear layers."""
    tensors: list[TensorSpec] = []
    for layer in range(LAYERS):
        for module, (inputs, outputs) in MODULES.items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            tensors.append(TensorSpec(f"{name}.lora_A.weight", (RANK, inputs)))
            tensors.append(TensorSpec(f"{name}.lora_B.weight", (outputs, RANK)))
    return AdapterSchema(tuple(sorted(tensors)), "0" * 64, dtype)


def _wire(schema: AdapterSchema) -> bytes:
    values = np.random.default_rng(0).standard_normal(schema.numel, np.float32) / 100
    update = torch.from_numpy(values).to(DTYPES[schema.dtype])
    return to_bytes(AdapterState(schema, update), "update")


def _contestants(schema: AdapterSchema, clinics: int) -> dict[str, Callable[[], object]]:
    """Return what is timed: each takes in ``clinics`` updates."""
    data = _wire(schema)
    single = replace(schema.of_rank(RANK // 2), dtype="float32")
    single_data = _wire(single)
    read = from_bytes(data, schema, "update", source="a clinic")
    mean, single_mean = WeightedMean(schema), WeightedMean(single)
    same_bytes = np.frombuffer(data, np.float32, offset=HEADER_BYTES)
    same_parameters = np.frombuffer(data, np.float16, offset=HEADER_BYTES)
    replies = [_reply(read, number) for number in range(clinics)]

    def times(step: Callable[[], object]) -> Callable[[], None]:
        def repeated() -> None:
            for _ in range(clinics):
                step()

        return repeated

    def one_thread() -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        times(lambda: _fold(mean, data, schema))()
        torch.set_num_threads(threads)

    def whole_round() -> AdapterState:
        fresh = WeightedMean(schema)
        times(lambda: _fold(fresh, data, schema))()
        return fresh.result()

    return {
        "numpy_add": times(_adding(same_bytes)),
        "fold": times(lambda: _fold(mean, data, schema)),
        "fold_only": times(lambda: mean.add(read, 7)),
        "fold_one_thread": one_thread,
        "fold_checked": times(lambda: _fold(mean, data, schema, checked=True)),
        "fold_float32": times(lambda: _fold(single_mean, single_data, single)),
        "numpy_widening_add": times(_adding(same_parameters)),
        "round": whole_round,
        "flower": lambda: aggregate_arrayrecords(replies, "rows"),
    }


def _fold(mean: WeightedMean, data: bytes, schema: AdapterSchema, *, checked: bool = False) -> None:
    update = from_bytes(data, schema, "update", source="a clinic")
    if checked:
        update.require_finite(source="a clinic")
    mean.add(update, 7)


def _adding(values: np.ndarray) -> Callable[[], object]:
    total = np.zeros(len(values), np.float32)
    return lambda: np.add(total, values, out=total)


def _reply(update: AdapterState, number: int) -> RecordDict:
    """Return the update as a Flower client would send it, an array a tensor."""
    arrays = {name: Array(tensor.numpy()) for name, tensor in update.tensors().items()}
    return RecordDict(
        {"arrays": ArrayRecord(arrays), "metrics": MetricRecord({"rows": 700 + number})}
    )


def _interleaved(
    contestants: dict[str, Callable[[], object]], turns: int
) -> dict[str, list[float]]:
    """Return each contestant's seconds, one a turn, after one turn that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(turns + 1):
        for name, contestant in contestants.items():
            began = time.perf_counter()
            contestant()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def _faster(seconds: dict[str, list[float]], one: str, other: str) -> float:
    pairs = zip(seconds[one], seconds[other], strict=True)
    return round(statistics.median(b / a for a, b in pairs), 3)


def _apart(measure: Callable[[Path, int], int], update: Path, clinics: int) -> int:
    """Return what a function measures in a process of its own."""
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=fresh) as pool:
        return pool.submit(measure, update, clinics).result()


def ours_peak(update: Path, clinics: int) -> int:
    """Fold updates that are read one after the other; return the peak in bytes."""
    return _folding_peak(update, clinics, checked=False)


def ours_checked_peak(update: Path, clinics: int) -> int:
    """As :func:`ours_peak`, and look for NaN in each."""
    return _folding_peak(update, clinics, checked=True)


def _folding_peak(update: Path, clinics: int, *, checked: bool) -> int:
    schema = llama_schema("float16")
    small = AdapterSchema(schema.tensors[:4], "0" * 64, "float16")
    _fold(WeightedMean(small), _wire(small), small, checked=True)  # what torch needs at first
    before = _memory("VmRSS")
    mean = WeightedMean(schema)
    for _ in range(clinics):
        # No name for the bytes: they must be gone when the next are read.
        _fold(mean, update.read_bytes(), schema, checked=checked)
    mean.result()
    return _memory("VmHWM") - before


def flower_peak(update: Path, clinics: int) -> int:
    """Aggregate replies that wait for each other, as Flower's do; return the peak in bytes."""
    schema, before = llama_schema("float16"), _memory("VmRSS")
    replies = [
        _reply(from_bytes(update.read_bytes(), schema, "update", source="a clinic"), number)
        for number in range(clinics)
    ]
    aggregate_arrayrecords(replies, "rows")
    return _memory("VmHWM") - before


def _memory(field: str) -> int:
    """Return a field of this process's status in bytes: what is resident now, or was at most."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"aggregate: this system does not tell {field}; run on Linux")


if __name__ == "__main__":
    main()
