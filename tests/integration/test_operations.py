"""The runbooks: every command in them is there, with its options, and what they name exists."""

import re
import shlex
from pathlib import Path

import click
import pytest
import typer.main

import fedpeft.cli
import fedpeft_client.cli
import fedpeft_server.cli
from fedpeft.bundle.making import MATERIAL

PROJECT = Path(__file__).resolve().parents[2]
DOCUMENTS = ("operations.md", "raspberry-pi.md", "jetson.md")
PROGRAMS = {
    program.name: program.app
    for program in (fedpeft.cli.program, fedpeft_client.cli.program, fedpeft_server.cli.program)
}
# What is not ours, and on every machine that the document is for.
SYSTEM = {
    "cat", "chmod", "dd", "df", "docker", "dpkg", "du", "fallocate", "hdparm", "install",
    "journalctl", "ln", "ls", "mkswap", "nft", "nvpmodel", "python3", "sh", "sha256sum", "swapon",
    "sysctl", "systemctl", "tar", "tegrastats", "uname", "vcgencmd",
}  # fmt: skip
SETTING = re.compile(r"\[\w+\]|\w+ ?= ?\S.*")


def lines(document: str) -> list[str]:
    text = (PROJECT / "docs" / document).read_text("utf-8")
    return list[str](re.findall(r"^ {4}(\S.*)$", text, re.MULTILINE))


def commands(document: str) -> list[list[str]]:
    """Return the words of every command, without the account and variables before them."""
    found: list[list[str]] = []
    for line in lines(document):
        plain = re.sub(r"^(sudo -u fedpeft |[A-Z]+=\S+ (?=\S))*", "", line)
        if not SETTING.fullmatch(plain):
            found.append(shlex.split(plain))
    return found


ALL = [(document, words) for document in DOCUMENTS for words in commands(document)]
each_command = pytest.mark.parametrize(
    ("document", "words"), ALL, ids=[f"{document}: {' '.join(words)}" for document, words in ALL]
)


@each_command
def test_the_command_is_one_of_ours_or_of_the_system(document: str, words: list[str]):
    name = words[0]
    if name in PROGRAMS:
        group = typer.main.get_command(PROGRAMS[name])
        assert isinstance(group, click.Group)
        assert words[1] in group.commands
        group.commands[words[1]].make_context(words[1], words[2:])
    elif name == "fedpeft-install":
        assert (PROJECT / "deploy" / "debian" / name).is_file()
        assert len(words) == 2 or words[2] == "--fingerprint"
    else:
        known = name in SYSTEM or re.fullmatch(
            r"(\.venv/bin/pip|python3\.11|/opt/fedpeft\S+)", name
        )
        assert known, name


@each_command
def test_the_installer_has_the_options_that_are_shown(document: str, words: list[str]):
    script = (MATERIAL / "install.sh").read_text()
    if words[:2] == ["sh", "fedpeft-offline/install.sh"]:
        assert [it for it in words if it.startswith("--") and f"{it})" not in script] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_of_the_project_that_are_named_exist(document: str):
    text = (PROJECT / "docs" / document).read_text("utf-8")
    named = set(re.findall(r"\bdeploy/[\w./-]+\w", text))
    assert [name for name in named if not (PROJECT / name).exists()] == []


def test_every_unit_is_described_with_its_real_limits():
    text = (PROJECT / "docs" / "operations.md").read_text("utf-8")
    for unit in sorted((MATERIAL / "systemd").glob("*.service")):
        row = next(line for line in text.splitlines() if line.startswith(f"| `{unit.name}`"))
        settings = dict(re.findall(r"^(\w+)=(.*)$", unit.read_text(), re.MULTILINE))
        assert f"{settings['MemoryMax'].rstrip('%')} %" in row
        assert f"{int(settings['CPUQuota'].rstrip('%')) // 100} cores" in row
        alive = settings.get("WatchdogSec", "none")
        assert {"30min": "half an hour", "5min": "5 minutes", "none": "none"}[alive] in row


@pytest.mark.parametrize(
    "heading",
    [
        "Add a clinic", "A clinic is offline", "A lost box", "A leaked key", "Disk full",
        "Upgrade", "Roll back",
    ],
)  # fmt: skip
def test_there_is_a_runbook(heading: str):
    text = (PROJECT / "docs" / "operations.md").read_text("utf-8")
    assert f"\n## {heading}\n" in text
