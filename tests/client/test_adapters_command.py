"""The commands ``adapters``: what people see of the versions on a box, and can do with them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from fedpeft.adapters import AdapterSchema, AdapterState, TensorSpec
from fedpeft.config import AdapterSettings
from fedpeft.errors import AdapterError, UnknownAdapter
from fedpeft_client.box import open_box
from fedpeft_client.commands import adapters as commands
from fedpeft_client.settings import (
    BoxModelSettings,
    ClientSettings,
    DataSettings,
    ServerSettings,
    StoreSettings,
    settings_toml,
)
from fedpeft_client.versions.acceptance import Losses, Verdict
from fedpeft_client.versions.status_line import adapter_line
from fedpeft_client.versions.store import AdapterStore
from fedpeft_client.versions.version import Arrival

SCHEMA = AdapterSchema(
    (
        TensorSpec("base_model.m.lora_A.weight", (2, 4)),
        TensorSpec("base_model.m.lora_B.weight", (3, 2)),
    ),
    "a" * 64,
)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A box with rounds 1 to 3; the second was taken and the third was not."""
    box = tmp_path / "box"
    box.mkdir()
    settings = ClientSettings(
        clinic="anna",
        server=ServerSettings(address="localhost:1", federation="sea"),
        model=BoxModelSettings(directory=Path("model")),
        data=DataSettings(train=Path("train.jsonl")),
        adapters=StoreSettings(max_versions=7, max_mb=9),
    )
    (box / "client.toml").write_text(settings_toml(settings), "utf-8")
    for name in ("identity.key", "server.identity"):
        (box / name).write_text("not needed here\n")
    store = open_box(box).adapter_store
    for number in (1, 2, 3):
        verdict = Verdict(
            accepted=number < 3,
            reason=f"of round {number}",
            rival=store.in_use_name(),
            new=Losses(own=4.0 - number, general=2.5),
            base=Losses(own=4.0, general=2.0),
        )
        state = AdapterState(SCHEMA, torch.full((SCHEMA.numel,), float(number)))
        store.keep(
            Arrival(
                state=state,
                settings=AdapterSettings(rank=2),
                base_name="base",
                federation="sea",
                run="1" * 32,
                round=number,
                lineage=b'{"made": "by three"}' if number == 2 else None,
            ),
            verdict,
        )
    return box


def run(*arguments: Any):
    return CliRunner().invoke(commands.app, [str(each) for each in arguments])


def store_of(directory: Path) -> AdapterStore:
    return open_box(directory).adapter_store


@pytest.mark.parametrize("command", ["show", "use", "pin", "unpin", "remove"])
def test_an_unknown_name_is_refused(command: str, directory: Path):
    error = run(command, "round-9", directory).exception
    assert isinstance(error, UnknownAdapter)
    assert "it has base, round-1, round-2, round-3" in str(error)


@pytest.mark.parametrize("command", ["show", "pin", "unpin", "remove"])
def test_the_base_model_is_no_version(command: str, directory: Path):
    error = run(command, "base", directory).exception

    assert isinstance(error, UnknownAdapter) and "no version of the adapter" in str(error)


def test_what_is_in_use_or_pinned_is_not_removed(directory: Path):
    assert isinstance(run("remove", "round-2", directory).exception, AdapterError)
    assert run("pin", "round-1", directory).exit_code == 0
    assert isinstance(run("remove", "round-1", directory).exception, AdapterError)
    assert run("unpin", "round-1", directory).exit_code == 0
    assert run("remove", "round-1", directory).exit_code == 0
    assert [version.name for version in store_of(directory).versions()] == ["round-2", "round-3"]


def test_versions_are_listed_with_state_and_loss(directory: Path):
    run("pin", "round-1", directory)
    lines = [line.split("\t") for line in run("list", directory).stdout.splitlines()]
    assert [(line[0], line[1], line[4]) for line in lines] == [
        ("round-1", "pinned", "loss 3.0000"),
        ("round-2", "in use", "loss 2.0000"),
        ("round-3", "not taken", "loss 1.0000"),
    ]
    found = json.loads(run("list", directory, "--json").stdout)
    assert [row["state"] for row in found["versions"]] == ["pinned", "in use", "not taken"]
    assert found["damaged"] == []


def test_a_damaged_version_is_shown_as_such(directory: Path):
    (store_of(directory).find("round-1").path / "adapter_config.json").write_text("{}")
    (store_of(directory).find("round-3").folder / "about.json").write_text("{}")
    done = run("list", directory)
    assert [line.split("\t")[:2] for line in done.stdout.splitlines()] == [
        ["round-1", "damaged"],
        ["round-2", "in use"],
    ]
    told = done.stderr.replace("\n", " ")
    assert "round-1 is damaged" in told
    assert "adapters remove round-3" in told
    assert isinstance(run("show", "round-1", directory).exception, AdapterError)
    assert json.loads(run("list", directory, "--json").stdout)["damaged"] == ["round-1", "round-3"]


def test_removing_a_damaged_version_in_use_says_what_answers_instead(directory: Path):
    (store_of(directory).find("round-2").path / "adapter_config.json").write_text("{}")
    told = run("remove", "round-2", directory).stderr

    assert "round-2 is removed" in told and "round-1 is in use again" in told


def test_a_version_is_shown_with_verdict_losses_and_lineage(directory: Path):
    shown = run("show", "round-2", directory).stdout
    assert "round 2 of federation sea" in shown
    assert "verdict\ttaken: of round 2" in shown
    assert "loss\tnew: own rows 2.0000, general language 2.5000" in shown
    assert "lineage.json" in shown
    found = json.loads(run("show", "round-2", directory, "--json").stdout)
    assert found["lineage"] == {"made": "by three"}
    assert found["about"]["schema"] == 1
    assert "none came with it" in run("show", "round-3", directory).stdout


def test_use_and_rollback_change_what_answers(directory: Path):
    assert run("use", "round-3", directory).exit_code == 0
    assert store_of(directory).in_use_name() == "round-3"
    assert "round-2 is in use again" in run("rollback", directory).stderr
    assert "round-1 is in use again" in run("rollback", directory).stderr
    run("use", "base", directory)
    assert store_of(directory).in_use() is None
    assert "round-1 is in use again" in run("rollback", directory).stderr


def test_an_empty_box_says_that_the_base_model_answers(directory: Path):
    for name in ("base", "round-1"):
        run("use", name, directory)
    run("use", "base", directory)
    for version in store_of(directory).versions():
        assert run("remove", version.name, directory).exit_code == 0
    done = run("list", directory)
    assert done.stdout == ""
    assert "the base model answers" in done.stderr


def test_the_quota_of_client_toml_is_that_of_the_store(directory: Path):
    assert store_of(directory)._quota == StoreSettings(max_versions=7, max_mb=9)


def test_the_status_line_says_what_is_in_use_and_why_the_newest_is_not(directory: Path):
    box = open_box(directory)
    assert adapter_line(box) == (
        "adapter\tround-2 in use; the newest, round-3, was not taken: of round 3"
    )
    box.adapter_store.use("round-3")
    assert adapter_line(box).startswith("adapter\tround-3 in use since 2")
    (box.adapter_store.find().path / "adapter_config.json").unlink()
    assert adapter_line(box).startswith("adapter\tPROBLEM: the adapter round-3 is damaged")
