"""Boxes that answer questions: the embedded base model, and adapters of finished rounds."""

from pathlib import Path
from typing import Any

import torch

from fedpeft.adapters import AdapterState, save_adapter
from fedpeft.config import AdapterSettings
from fedpeft.models import adapter_schema, resolve_base
from fedpeft_client.settings import (
    BoxModelSettings,
    ClientSettings,
    DataSettings,
    InferenceSettings,
    ServerSettings,
    settings_toml,
)
from fedpeft_client.versions.acceptance import Verdict
from fedpeft_client.versions.store import AdapterStore
from fedpeft_client.versions.version import Arrival, Version

EMBEDDED = resolve_base("embedded", relative_to=Path())
LORA = AdapterSettings(rank=4, alpha=8.0)


def adapter_values(seed: int, base: Path = EMBEDDED) -> AdapterState:
    """Return an adapter that changes what the base model says; another one for each seed."""
    schema = adapter_schema(base, LORA)
    generator = torch.Generator().manual_seed(seed)
    return AdapterState(schema, torch.randn(schema.numel, generator=generator) * 0.15)


def stock_adapter(folder: Path, seed: int, base: Path = EMBEDDED) -> Path:
    """Write a stock PEFT directory."""
    save_adapter(adapter_values(seed, base), LORA, folder, base_name="base")
    return folder


def make_box(directory: Path, *, rounds: int = 2, base: Path = EMBEDDED, **inference: Any) -> Path:
    """Make a box that has taken part in ``rounds`` rounds; the last one is in use."""
    directory.mkdir()
    settings = ClientSettings(
        clinic="northfield",
        server=ServerSettings(address="127.0.0.1:1", federation="heart"),
        model=BoxModelSettings(directory=base),
        data=DataSettings(train=Path("train.jsonl")),
        inference=InferenceSettings.model_validate(
            {"quantisation": "f32", "context": 256} | inference
        ),
    )
    (directory / "client.toml").write_text(settings_toml(settings), "utf-8")
    for name in ("identity.key", "server.identity"):  # a box has them; answering needs neither
        (directory / name).touch()
    for number in range(1, rounds + 1):
        arrive(directory, number)
    return directory


def arrive(directory: Path, number: int, *, accepted: bool = True) -> Version:
    """Let the adapter of a round arrive."""
    store = AdapterStore(directory / "adapters")
    arrival = Arrival(
        state=adapter_values(number),
        settings=LORA,
        base_name="base",
        federation="heart",
        run="1" * 32,
        round=number,
    )
    verdict = Verdict(accepted=accepted, reason="of the test", rival=store.in_use_name())
    return store.keep(arrival, verdict)
