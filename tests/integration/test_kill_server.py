"""The central side is killed at twenty random moments: every finished round stays as it was."""

import json
import os
import subprocess
import sys
from pathlib import Path

SEED = int(os.environ.get("FEDPEFT_KILL_SEED", "20"))
KILLS = 20
ROUNDS = 12
# One process that has the libraries loaded forks the program anew after each kill.
_PROGRAM = """
import json, os, random, signal, sys, time
from hashlib import sha256
from pathlib import Path

from fedpeft.offline import enforce

enforce()
import torch

from fedpeft.simulation.plan import plan_simulation
from fedpeft.simulation.run import simulate
from tests.integration.test_faults import Listener

torch.set_num_threads(1)
root, seed, kills, rounds = Path(sys.argv[1]), *map(int, sys.argv[2:])
settings = [
    "training.local_steps=2", f"rounds.count={rounds}", "aggregation.confidentiality=sealed",
]


def run(out):
    simulate(plan_simulation(None, settings, engine="local", out=out), Listener())


def digests(out):
    found = {}
    for folder in (out / "rounds").glob("[0-9]*"):
        whole = sha256()
        for path in sorted(each for each in folder.rglob("*") if each.is_file()):
            whole.update(str(path.relative_to(folder)).encode() + path.read_bytes())
        found[int(folder.name)] = whole.hexdigest()
    return found


def start(out):
    if (child := os.fork()) == 0:
        run(out)
        os._exit(0)
    return child


whole, parts = root / "whole", root / "parts"
assert os.waitpid(start(whole), 0)[1] == 0
made = [(whole / "rounds" / str(number)).stat().st_mtime for number in (1, rounds)]
a_round = (made[1] - made[0]) / (rounds - 1)
began = time.monotonic()
assert os.waitpid(start(whole), 0)[1] == 0  # nothing is left to do
set_up = time.monotonic() - began
chance, seen, killed, changed = random.Random(seed), {}, 0, []
while True:
    child = start(parts)
    if killed < kills:
        time.sleep(chance.uniform(0.5 * set_up, set_up + 1.5 * a_round))
        ended, status = os.waitpid(child, os.WNOHANG)
        if not ended:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            killed += 1
    else:
        _, status = os.waitpid(child, 0)
    now = digests(parts)
    changed += [number for number in seen if now.get(number) != seen[number]]
    seen |= now
    if not os.WIFSIGNALED(status):
        break
weights = [(out / "adapter" / "adapter_model.safetensors").read_bytes() for out in (whole, parts)]
print(json.dumps({
    "status": status, "killed": killed, "changed": changed, "rounds": sorted(seen),
    "same": weights[0] == weights[1],
}))
"""


def test_killed_at_random_moments_a_run_keeps_its_rounds_and_ends_with_the_same_adapter(
    tmp_path: Path,
) -> None:
    root = Path(__file__).parents[2]
    ran = subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(tmp_path), *map(str, (SEED, KILLS, ROUNDS))],
        capture_output=True,
        text=True,
        timeout=500,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert ran.returncode == 0, f"FEDPEFT_KILL_SEED={SEED} repeats it\n{ran.stderr[-2000:]}"
    found = json.loads(ran.stdout.splitlines()[-1])
    assert found["killed"] >= KILLS // 2
    assert found["status"] == 0
    assert found["changed"] == []
    assert found["rounds"] == list(range(ROUNDS + 1))
    assert found["same"]
