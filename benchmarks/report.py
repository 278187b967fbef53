"""The one JSON line that every benchmark ends with."""

import datetime
import json
import operator
import platform
from pathlib import Path
from typing import Any

import psutil

_OPERATORS = {">=": operator.ge, "<=": operator.le}


def bar(value: float, op: str, wanted: float) -> dict[str, Any]:
    """Compare a figure that was just measured with the one that was asked for."""
    return {"value": value, "op": op, "bar": wanted, "met": bool(_OPERATORS[op](value, wanted))}


def emit(benchmark: str, results: dict[str, Any], bars: dict[str, dict[str, Any]]) -> None:
    """Print the line on stdout."""
    line = {
        "benchmark": benchmark,
        "machine": machine(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "results": results,
        "bars": bars,
    }
    print(json.dumps(line))


def machine() -> str:
    """Return the processor, cores, memory and system."""
    memory = psutil.virtual_memory().total / 2**30
    return f"{_processor()}, {psutil.cpu_count()} cores, {memory:.0f} GiB, {platform.system()}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
