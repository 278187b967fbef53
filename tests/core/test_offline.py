"""The offline switch: importing fedpeft is enough, whatever the environment said before."""

import json
import os
import subprocess
import sys

import pytest

ALWAYS = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
}
HUB = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
CONTRARY = {name: "0" if value == "1" else "1" for name, value in {**ALWAYS, **HUB}.items()}


def environment_after(statement: str, **given: str) -> dict[str, str]:
    """Run ``statement`` in a fresh Python under ``given`` and return its environment."""
    script = f"{statement}; import json, os; print(json.dumps(dict(os.environ)))"
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    done = subprocess.run(
        [sys.executable, "-c", script], env={**kept, **given}, capture_output=True, check=True
    )
    return json.loads(done.stdout)


PACKAGES = ["fedpeft", "fedpeft_client", "fedpeft_server"]


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_a_package_overrules_an_environment_that_says_otherwise(package: str):
    after = environment_after(f"import {package}", **CONTRARY)
    assert {name: after.get(name) for name in {**ALWAYS, **HUB}} == {**ALWAYS, **HUB}


def test_the_hub_stays_on_where_a_person_allowed_it_and_telemetry_off():
    after = environment_after("import fedpeft", FEDPEFT_ALLOW_HUB="1", **CONTRARY)
    assert {name: after[name] for name in ALWAYS} == ALWAYS
    assert {name: after[name] for name in HUB} == dict.fromkeys(HUB, "0")


@pytest.mark.parametrize("value", ["", "0", "true", "yes"])
def test_only_1_allows_the_hub(value: str):
    after = environment_after("import fedpeft", FEDPEFT_ALLOW_HUB=value)
    assert {name: after.get(name) for name in HUB} == HUB


def test_a_persons_wish_for_more_output_is_kept():
    after = environment_after("import fedpeft", TRANSFORMERS_VERBOSITY="info")
    assert after["TRANSFORMERS_VERBOSITY"] == "info"


def test_threads_that_wait_spin_shortly_unless_a_person_wants_it_otherwise():
    assert int(environment_after("import fedpeft")["GOMP_SPINCOUNT"]) <= 10_000
    after = environment_after("import fedpeft", GOMP_SPINCOUNT="7", OMP_WAIT_POLICY="ACTIVE")
    assert (after["GOMP_SPINCOUNT"], after["OMP_WAIT_POLICY"]) == ("7", "ACTIVE")


def test_the_libraries_saw_the_switch():
    script = (
        "import fedpeft, huggingface_hub.constants as c, transformers.utils.hub as h; "
        "import sys; sys.exit(0 if c.HF_HUB_OFFLINE and h.is_offline_mode() else 1)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, **CONTRARY}, check=False
    )
    assert done.returncode == 0
