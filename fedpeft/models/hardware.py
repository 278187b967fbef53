"""What this machine computes on: the device and the number format."""

from pathlib import Path

import torch

from fedpeft.config import ComputeDtype

_BF16_CPU_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}


def choose_device() -> torch.device:
    """Return the first CUDA device if there is one, else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def choose_dtype(requested: ComputeDtype, device: torch.device) -> torch.dtype:
    """Return the compute dtype: ``auto`` is bfloat16 only where the hardware has it natively.

    Emulated bfloat16 is slower than float32 on a CPU and no more precise anywhere.
    """
    if requested == "float32":
        return torch.float32
    if requested == "bfloat16" or has_native_bfloat16(device):
        return torch.bfloat16
    return torch.float32


def has_native_bfloat16(device: torch.device) -> bool:
    """Say whether ``device`` multiplies bfloat16 in hardware."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return not _BF16_CPU_FLAGS.isdisjoint(_cpu_flags())


def _cpu_flags() -> frozenset[str]:
    """Read the processor's feature flags; empty where the system does not tell them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return frozenset()
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()
