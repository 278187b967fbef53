"""The container files are sound: every instruction, the account, the health check, no secret."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer.main
import yaml

from fedpeft_client.cli import program as client
from fedpeft_server.cli import program as server

PROJECT = Path(__file__).resolve().parents[2]
PLACE = PROJECT / "deploy" / "container"
PROGRAMS = {"fedpeft-client": client, "fedpeft-server": server}
# All that a Containerfile here may use. ADD fetches, ONBUILD and SHELL surprise.
INSTRUCTIONS = {
    "ARG", "FROM", "ENV", "WORKDIR", "COPY", "RUN", "LABEL", "USER", "VOLUME", "STOPSIGNAL",
    "EXPOSE", "HEALTHCHECK", "ENTRYPOINT", "CMD",
}  # fmt: skip
SECRET = re.compile(r"PASS|SECRET|TOKEN|CREDENTIAL|API_?KEY|PRIVATE", re.IGNORECASE)
SERVICE_KEYS = {
    "restart", "read_only", "user", "cap_drop", "security_opt", "tmpfs", "pids_limit",
    "stop_signal", "logging", "profiles", "image", "build", "command", "ports", "volumes",
    "mem_limit", "cpus", "stop_grace_period",
}  # fmt: skip


class Instruction(NamedTuple):
    stage: str
    word: str
    rest: str


def instructions() -> Iterator[Instruction]:
    """Yield every instruction with the stage that it is in; continued lines are joined."""
    text = (PLACE / "Containerfile").read_text()
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    stage = ""
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        if not line.strip():
            continue
        word, _, rest = line.partition(" ")
        if word == "FROM":
            match = re.fullmatch(r"(\S+) AS ([a-z]+)", rest)
            assert match is not None, "every stage has a name"
            stage = match[2]
        yield Instruction(stage, word, " ".join(rest.split()))


ALL = list(instructions())


def of(word: str) -> list[Instruction]:
    return [each for each in ALL if each.word == word]


def in_stage(stage: str) -> list[Instruction]:
    """Return what a stage does, after what it is made from does."""
    own = [each for each in ALL if each.stage == stage]
    base = own[0].rest.split()[0]
    return (in_stage(base) if base in STAGES else []) + own


STAGES = {each.stage for each in of("FROM")}


def test_every_instruction_is_one_that_is_allowed():
    assert {each.word for each in ALL} <= INSTRUCTIONS
    assert ALL[0].word == "ARG"


def test_every_stage_stands_on_the_pinned_base_or_an_earlier_stage():
    seen: list[str] = []
    for each in of("FROM"):
        assert each.rest.split()[0] in ["${BASE}", *seen]
        seen.append(each.stage)
    base = ALL[0].rest.removeprefix("BASE=")
    assert re.fullmatch(r"[a-z.]+/[a-z/]+:\d+\.\d+\.\d+-[a-z]+-[a-z]+(@sha256:[0-9a-f]{64})?", base)


def test_no_image_is_the_latest_one_and_nothing_is_fetched_by_hand():
    text = (PLACE / "Containerfile").read_text() + (PLACE / "compose.yaml").read_text()
    assert "latest" not in text
    assert not re.search(r"\b(curl|wget|apt-get|git clone|https?://)", text)


def test_no_secret_is_built_in():
    named = [each.rest for word in ("ARG", "ENV", "LABEL") for each in of(word)]
    assert [text for text in named if SECRET.search(text)] == []
    copied = [source for each in of("COPY") for source in each.rest.split()[:-1]]
    assert [source for source in copied if SECRET.search(source) or source == "."] == []


def test_what_is_copied_exists_and_is_sent_to_the_engine():
    sent = (PLACE / "Containerfile.dockerignore").read_text().splitlines()
    for each in of("COPY"):
        if each.rest.startswith("--from="):
            assert each.rest.split()[0].removeprefix("--from=") in STAGES
            continue
        for source in each.rest.split()[:-1]:
            assert (PROJECT / source).exists()
            assert f"!{source}" in sent
    assert "*" in sent


@pytest.mark.parametrize("word", ["RUN", "ENTRYPOINT", "CMD"])
def test_commands_are_lists_that_no_shell_reads(word: str):
    for each in of(word):
        command = json.loads(each.rest)
        assert command
        assert all(isinstance(part, str) for part in command)


@pytest.mark.parametrize("stage", ["client", "server"])
def test_the_image_runs_a_command_that_exists_as_nobody_in_particular(stage: str):
    last = {each.word: each.rest for each in in_stage(stage)}
    user, group = last["USER"].split(":")
    assert int(user) > 0 < int(group)
    (name,) = json.loads(last["ENTRYPOINT"])
    command, _ = json.loads(last["CMD"])
    assert command in typer.main.get_group(PROGRAMS[name].app).commands
    assert last["STOPSIGNAL"] == "SIGINT"
    # The tools that built it are left behind.
    assert "build" not in {each.stage for each in in_stage(stage)}


@pytest.mark.parametrize("stage", ["client", "server"])
def test_the_health_check_sees_a_heartbeat_that_stopped(stage: str, tmp_path: Path):
    (check,) = [each.rest for each in ALL if (each.stage, each.word) == (stage, "HEALTHCHECK")]
    assert re.match(r"--interval=\d+s --timeout=\d+s --start-period=\d+s --retries=\d+ CMD ", check)
    python, flag, code = json.loads(check.split(" CMD ")[1])
    assert (python, flag) == ("python", "-c")
    environment = " ".join(each.rest for each in in_stage(stage) if each.word == "ENV")
    heartbeat = re.search(r"FEDPEFT_HEARTBEAT=(\S+)", environment)
    assert heartbeat is not None
    file = tmp_path / "heartbeat"
    assert heartbeat[1] in code
    here = code.replace(heartbeat[1], str(file))

    def healthy() -> bool:
        return subprocess.run([sys.executable, "-c", here], capture_output=True).returncode == 0

    assert not healthy()
    file.touch()
    assert healthy()
    os.utime(file, (0, time.time() - 3600))
    assert not healthy()


# compose


def services() -> dict[str, dict[str, Any]]:
    return yaml.safe_load((PLACE / "compose.yaml").read_text())["services"]


@pytest.mark.parametrize("name", ["client", "server"])
def test_the_service_is_hardened_and_bounded(name: str):
    service = services()[name]
    assert set(service) <= SERVICE_KEYS
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["user"] == "10001:10001"
    assert {"mem_limit", "cpus", "pids_limit"} <= set(service)
    assert "privileged" not in service
    assert service["build"]["target"] in STAGES
    assert (PLACE / service["build"]["context"]).resolve() == PROJECT
    assert (PROJECT / service["build"]["dockerfile"]).is_file()


def test_records_and_model_are_mounted_read_only_and_the_ledger_is_kept():
    mounts = {each["target"]: each for each in services()["client"]["volumes"]}
    assert mounts["/srv/records"]["read_only"]
    assert mounts["/srv/model"]["read_only"]
    # The privacy ledger lies beside the box, so that the folder above it is what is kept.
    assert "/var/lib/fedpeft" in mounts


def test_a_clinic_opens_no_port_and_a_site_one():
    assert "ports" not in services()["client"]
    assert services()["server"]["ports"] == ["8443:8443"]
