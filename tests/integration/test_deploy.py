"""What `deploy/` ships fits the programs, and systemd, the kernel and nft accept it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from fedpeft.errors import ConfigError, EnrolmentError, FlowerPinError, KeyLocked, PrivacyError
from fedpeft_client.cli import program as client
from fedpeft_server.cli import program as server

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
UNITS = DEPLOY / "systemd"
NAMES = sorted(path.stem for path in UNITS.glob("*.service"))
PROGRAMS = {"fedpeft-client": client, "fedpeft-server": server}
LASTING = (ConfigError, EnrolmentError, FlowerPinError, KeyLocked, PrivacyError)
HARDENING = {
    "NoNewPrivileges": "yes",
    "ProtectSystem": "strict",
    "PrivateTmp": "yes",
    "PrivateDevices": "yes",
    "CapabilityBoundingSet": "",
    "UMask": "0077",
    "Restart": "on-failure",
    "RestartSec": "20",
}
each_unit = pytest.mark.parametrize("name", NAMES)


def service(name: str) -> dict[str, str]:
    """Return the last value of each key in the unit's [Service] section."""
    text = (UNITS / f"{name}.service").read_text()
    section = text.split("[Service]")[1].split("\n[")[0]
    return dict(re.findall(r"^(\w+)=(.*)$", section, re.MULTILINE))


def needs(tool: str) -> str:
    """Return where a tool lies; the test is skipped where it does not."""
    found = shutil.which(tool, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if found is None:
        pytest.skip(f"{tool} is not installed here")
    return found


def runs(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_there_is_a_unit_for_clinic_site_and_inference():
    assert NAMES == ["fedpeft-client", "fedpeft-serve", "fedpeft-server"]


@each_unit
def test_the_command_exists(name: str):
    command = re.fullmatch(r"/opt/fedpeft/bin/(\S+) (\S+) /\S+", service(name)["ExecStart"])
    assert command is not None
    assert command[2] in typer.main.get_group(PROGRAMS[command[1]].app).commands


@each_unit
def test_lasting_errors_are_not_retried_and_passing_ones_are(name: str):
    codes = {int(code) for code in service(name)["RestartPreventExitStatus"].split()}
    assert codes
    assert codes <= {error.exit_code for error in LASTING}


@each_unit
def test_the_unit_is_hardened_and_bounded(name: str):
    settings = service(name)
    assert {key: settings.get(key) for key in HARDENING} == HARDENING
    assert settings["User"] == "fedpeft"
    assert re.fullmatch(r"\d+%", settings["CPUQuota"])
    assert re.fullmatch(r"\d+%", settings["MemoryMax"])


@pytest.mark.parametrize("name", ["fedpeft-client", "fedpeft-server"])
def test_systemd_waits_for_the_signs_of_life_that_the_program_gives(name: str):
    assert service(name)["Type"] == "notify"
    assert service(name)["WatchdogSec"] in {"30min", "5min"}


def test_local_inference_is_kept_to_this_machine_by_the_kernel():
    settings = service("fedpeft-serve")
    assert (settings["IPAddressDeny"], settings["IPAddressAllow"]) == ("any", "localhost")


@each_unit
def test_systemd_accepts_the_unit(name: str, tmp_path: Path):
    analyze = needs("systemd-analyze")
    # The check wants the program to be there: take this environment's.
    text = (UNITS / f"{name}.service").read_text()
    here = str(Path(sys.executable).parent)
    unit = tmp_path / f"{name}.service"
    unit.write_text(text.replace("/opt/fedpeft/bin", here).replace("User=fedpeft", "User=root"))
    done = runs(analyze, "verify", "--man=no", str(unit))
    complaints = [line for line in done.stderr.splitlines() if name in line]
    assert done.returncode == 0, done.stderr
    assert complaints == []


@each_unit
def test_the_exposure_of_the_unit_is_at_most_two(name: str):
    analyze = needs("systemd-analyze")
    unit = str(UNITS / f"{name}.service")
    done = runs(analyze, "security", "--offline=true", "--threshold=20", "--no-pager", unit)
    level = re.search(r"Overall exposure level for \S+: (\d+\.\d+)", done.stdout)
    assert level is not None, done.stderr
    assert float(level[1]) <= 2.0
    assert done.returncode == 0


def test_the_account_has_no_shell_and_its_directory_is_closed():
    users = needs("systemd-sysusers")
    done = runs(users, "--dry-run", str(UNITS / "fedpeft.sysusers"))
    assert done.returncode == 0, done.stderr
    line = (UNITS / "fedpeft.sysusers").read_text().splitlines()[-1].split()
    assert (line[1], line[-1]) == ("fedpeft", "/usr/sbin/nologin")
    directory = (UNITS / "fedpeft.tmpfiles").read_text().splitlines()[-1].split()
    assert directory[:5] == ["d", "/var/lib/fedpeft", "0750", "fedpeft", "fedpeft"]


def test_the_kernel_knows_every_setting():
    text = (DEPLOY / "sysctl" / "60-fedpeft.conf").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    keys = [re.fullmatch(r"([a-z0-9_.]+) = \S.*", line) for line in lines]
    assert len(keys) >= 8
    names = [key[1] for key in keys if key is not None]
    assert len(names) == len(lines) == len(set(names))
    if not Path("/proc/sys/kernel/yama").is_dir():
        names = [name for name in names if ".yama." not in name]  # built without Yama
    assert [name for name in names if not Path("/proc/sys", *name.split(".")).exists()] == []


def firewall_rules() -> str:
    return (DEPLOY / "firewall" / "fedpeft.nft").read_text()


def test_the_firewall_lets_nothing_in_that_is_not_named():
    text = firewall_rules()
    assert "hook input priority filter; policy drop;" in text
    assert "flush ruleset" not in text
    assert text.count("{") == text.count("}")
    assert re.search(r"^define site_port = 8443$", text, re.MULTILINE)


def test_nft_loads_the_firewall_twice(tmp_path: Path):
    nft, unshare = needs("nft"), needs("unshare")
    if runs(unshare, "-rn", "true").returncode:
        pytest.skip("network namespaces cannot be made here")
    # The account is made on the machine that the rules are for; here another serves.
    rules = tmp_path / "rules.nft"
    rules.write_text(firewall_rules().replace('"fedpeft"', "65534"))
    load = f"{nft} -f {rules} && {nft} -f {rules} && {nft} list ruleset"
    done = runs(unshare, "-rn", "sh", "-c", load)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("table inet fedpeft") == 1
    assert done.stdout.count("policy drop") == 1
