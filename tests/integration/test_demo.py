"""``fedpeft demo`` shows what federating gains, with figures that stand."""

import json
import subprocess
import sys
from pathlib import Path


def test_federating_beats_training_alone(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fedpeft", "demo", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=590)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "summary.json").read_text())["exact_match"]
    assert found["base"] <= 0.05
    assert found["best_single"] <= 0.40
    assert found["federated"] >= 0.60
    models = {
        each["model"]: each
        for each in json.loads((tmp_path / "comparison.json").read_text())["models"]
    }
    assert models["federated"]["valid_loss"] <= 1.10 * models["pooled"]["valid_loss"]
    for name in ("base model", "federated", "pooled", "harbour alone"):
        assert name in done.stderr
