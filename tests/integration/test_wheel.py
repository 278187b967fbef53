"""What is shipped works: the built wheel, alone in an empty environment."""

import json
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out)]
    done = subprocess.run([*command, str(PROJECT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_holds_the_packages_and_the_demo_model_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"fedpeft", "fedpeft_client", "fedpeft_server", "fedpeft_strategies"}
    for needed in ("model.safetensors", "tokenizer.json", "config.json", "chat_template.jinja"):
        assert f"fedpeft/demo/base/{needed}" in names
    weights = zipfile.ZipFile(wheel).getinfo("fedpeft/demo/base/model.safetensors")
    assert weights.file_size <= 8_000_000


def test_the_wheel_runs_the_first_round_in_an_empty_environment(
    wheel: Path, tmp_path: Path
) -> None:
    home = tmp_path / "venv"
    venv.create(home, with_pip=True)
    install = [str(home / "bin" / "pip"), "install", "--quiet", str(wheel)]
    done = subprocess.run(install, capture_output=True, text=True, timeout=560)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = [str(home / "bin" / "fedpeft"), "simulate", "--out", str(out)]
    done = subprocess.run(
        [*command, "--set", "rounds.count=1"],
        capture_output=True,
        text=True,
        env=env,
        cwd=tmp_path,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    (only,) = json.loads((out / "summary.json").read_text())["rounds"]
    assert len(only["participants"]) == 4
    assert not only["failed"]
    for program in ("fedpeft-client", "fedpeft-server"):
        asked = [str(home / "bin" / program), "--help"]
        assert subprocess.run(asked, capture_output=True, env=env).returncode == 0
