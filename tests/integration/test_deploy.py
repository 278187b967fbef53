"""The systemd units name commands that exist, and systemd accepts them."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from fedpeft.console import Program
from fedpeft.errors import ConfigError, EnrolmentError, FlowerPinError, KeyLocked, PrivacyError
from fedpeft_client.cli import program as client
from fedpeft_server.cli import program as server

UNITS = Path(__file__).resolve().parents[2] / "deploy" / "systemd"
PROGRAMS = {"fedpeft-client": client, "fedpeft-server": server}
LASTING = (ConfigError, EnrolmentError, FlowerPinError, KeyLocked, PrivacyError)


@pytest.mark.parametrize("name", sorted(PROGRAMS))
def test_the_command_exists_and_lasting_errors_are_not_retried(name: str) -> None:
    text = (UNITS / f"{name}.service").read_text()
    command = re.search(r"^ExecStart=/opt/fedpeft/bin/(\S+) (\S+) \S+$", text, re.MULTILINE)
    assert command is not None
    program: Program = PROGRAMS[command[1]]
    assert command[2] in typer.main.get_group(program.app).commands
    lasting = re.search(r"^RestartPreventExitStatus=(.*)$", text, re.MULTILINE)
    assert lasting is not None
    known = {error.exit_code for error in LASTING}
    assert {int(code) for code in lasting[1].split()} <= known


@pytest.mark.parametrize("name", sorted(PROGRAMS))
def test_systemd_accepts_the_unit(name: str, tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed here")
    # The check wants the program to be there: take this environment's.
    text = (UNITS / f"{name}.service").read_text()
    here = str(Path(sys.executable).parent)
    unit = tmp_path / f"{name}.service"
    unit.write_text(text.replace("/opt/fedpeft/bin", here).replace("User=fedpeft", "User=root"))
    command = ["systemd-analyze", "verify", "--man=no", str(unit)]
    done = subprocess.run(command, capture_output=True, text=True)
    complaints = [line for line in done.stderr.splitlines() if name in line]
    assert done.returncode == 0, done.stderr
    assert complaints == []
