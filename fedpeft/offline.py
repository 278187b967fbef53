"""Keep every library off the network, quiet and neighbourly, before any of them is imported.

Must not import anything but the standard library: the switches below are read
by flwr, transformers and huggingface_hub while those are being imported.
"""

import logging
import os

ALLOW_HUB = "FEDPEFT_ALLOW_HUB"
"""Environment variable: ``1`` lets a base model be fetched from a model hub by its id."""

_PHONE_HOME_OFF = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
}
_QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
# Arithmetic threads that wait spin for some microseconds and then sleep. Spinning for long made a
# round take 16 s instead of 6 s beside another busy program; sleeping at once made llama.cpp
# generate 30 tokens/s instead of 105 (docs/measurements.md).
_NEIGHBOURLY = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}
_HUB_OFF = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


def hub_allowed() -> bool:
    """Say whether a person has allowed downloads of base models on this machine."""
    return os.environ.get(ALLOW_HUB) == "1"


def enforce() -> None:
    """Set the switches in ``os.environ``; child processes inherit them.

    Telemetry is off always, whatever the environment said before. The hub is
    off unless ``FEDPEFT_ALLOW_HUB=1``.
    """
    os.environ.update(_PHONE_HOME_OFF)
    for name, value in {**_QUIET, **_NEIGHBOURLY}.items():
        os.environ.setdefault(name, value)
    # On import it recommends a package that would fetch kernels from a hub.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if not hub_allowed():
        os.environ.update(_HUB_OFF)
