"""The three engines run the same apps, so they reach the same adapter, and stay on this machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

PROJECT = Path(__file__).resolve().parents[2]
EXAMPLE = PROJECT / "examples" / "ten-clinics.toml"

# Loaded by every Python process that has its directory on PYTHONPATH, the clinics' included.
HOOK = """
import os, sys
def _watch(event, arguments):
    if event in ("socket.getaddrinfo", "socket.gethostbyname"):
        host = arguments[0]
    elif event in ("socket.connect", "socket.sendto"):
        address = arguments[1]
        host = address[0] if isinstance(address, tuple) else "unix"
    else:
        return
    host = host.decode() if isinstance(host, bytes) else str(host)
    with open(os.environ["FEDPEFT_TEST_HOSTS"], "a") as file:
        file.write(host + "\\n")
sys.addaudithook(_watch)
"""
# Losses of single clinics, and adapters that repeat to the last bit, are not to be had from sums.
SEALED = ("--set", "aggregation.confidentiality=sealed")
LOOPBACK = {"127.0.0.1", "::1", "localhost", "unix", "0.0.0.0", "None"}


def simulate(out: Path, *arguments: str, env: dict[str, str] | None = None) -> dict[str, object]:
    command = [sys.executable, "-m", "fedpeft", "simulate", "--out", str(out), *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **(env or {})}, timeout=560
    )
    assert done.returncode == 0, done.stderr
    return json.loads((out / "summary.json").read_text())


def largest_difference(one: Path, other: Path) -> float:
    left, right = (load_file(place / "adapter_model.safetensors") for place in (one, other))
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).abs().max()) for name in left)


def distance(one: Path, other: Path) -> float:
    """The norm of the difference of all products BA, as a part of that of the products."""
    left, right = (load_file(place / "adapter_model.safetensors") for place in (one, other))
    apart = whole = 0.0
    for name in (name for name in left if "lora_A" in name):
        b = name.replace("lora_A", "lora_B")
        product = left[b].double() @ left[name].double()
        apart += float((product - right[b].double() @ right[name].double()).square().sum())
        whole += float(product.square().sum())
    return (apart / whole) ** 0.5


@pytest.fixture(scope="module")
def ten_clinics(tmp_path_factory: pytest.TempPathFactory, shared: Path) -> Path:
    assert shared.is_dir()
    out = tmp_path_factory.mktemp("ten-clinics")
    simulate(out, str(EXAMPLE), *SEALED)
    return out


def test_every_one_of_ten_real_clinics_gains(ten_clinics: Path) -> None:
    summary = json.loads((ten_clinics / "summary.json").read_text())
    losses = summary["valid_loss"]
    assert len(losses["per_clinic"]) == 10
    falls = [1 - found["final"] / found["base"] for found in losses["per_clinic"].values()]
    assert min(falls) > 0
    assert sum(falls) / len(falls) >= 0.25
    assert losses["final"] < losses["base"]
    assert [len(done["participants"]) for done in summary["rounds"]] == [10] * 5
    assert all(done["bytes_up"] > 0 < done["bytes_down"] for done in summary["rounds"])


def test_the_real_network_gives_the_adapter_of_the_local_engine(
    ten_clinics: Path, tmp_path: Path
) -> None:
    # The schedule is constant, so two rounds are the first two of the five above.
    summary = simulate(
        tmp_path, str(EXAMPLE), "--engine", "flower", "--set", "rounds.count=2", *SEALED
    )
    assert summary["engine"] == "flower"
    assert [done["failed"] for done in summary["rounds"]] == [[], []]  # pyright: ignore
    # A mean in another order differs by rounding, which directions that are hardly used
    # magnify in the factors of an orthonormal gauge, not in their product.
    assert distance(tmp_path / "adapter", ten_clinics / "rounds" / "2" / "adapter") <= 1e-3


QUICK = ("--set", "training.local_steps=2", "--set", "rounds.count=1")


def test_ray_gives_the_adapter_of_the_local_engine(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="the engine 'ray' is an extra: pip install 'fedpeft[ray]'")
    simulate(tmp_path / "local", *QUICK, *SEALED)
    summary = simulate(tmp_path / "ray", "--engine", "ray", *QUICK, *SEALED)
    assert summary["rounds"][0]["failed"] == []  # pyright: ignore
    places = (tmp_path / name / "adapter" for name in ("local", "ray"))
    assert largest_difference(*places) <= 1e-5


@pytest.mark.parametrize("engine", ["local", "flower"])
def test_a_whole_federation_looks_up_no_name_but_loopback(tmp_path: Path, engine: str) -> None:
    hosts = tmp_path / "hosts"
    hosts.touch()
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(HOOK)
    env = {
        "PYTHONPATH": str(tmp_path / "hook"),
        "FEDPEFT_TEST_HOSTS": str(hosts),
        # What a careless environment would say must not matter.
        "FLWR_TELEMETRY_ENABLED": "1",
        "HF_HUB_OFFLINE": "0",
    }
    simulate(tmp_path / "out", "--engine", engine, *QUICK, env=env)
    seen = set(hosts.read_text().split())
    assert seen <= LOOPBACK
    assert ("127.0.0.1" in seen) == (engine == "flower")


def test_the_adapter_loads_with_plain_peft(tmp_path: Path, embedded_model: Path) -> None:
    simulate(tmp_path, *QUICK)
    script = f"""
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained({str(embedded_model)!r}, dtype=torch.float32)
ids = torch.tensor([[5, 6, 7, 8]])
plain = base(ids).logits
adapted = PeftModel.from_pretrained(base, {str(tmp_path / "adapter")!r})(ids).logits
assert not torch.allclose(plain, adapted)
import sys
assert "fedpeft" not in sys.modules
"""
    command = [sys.executable, "-W", "ignore", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
