"""A clinic's own factors on disk: restarts, rounds that are repeated, and damage."""

import dataclasses
import json
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fedpeft.adapters import AdapterSchema, AdapterState, TensorSpec
from fedpeft.errors import StorageError
from fedpeft_client.rounds.personal import PersonalStore

SCHEMA = AdapterSchema(
    tuple(TensorSpec(f"m.{at}.lora_B.weight", (5, 3)) for at in range(2)), "a" * 64
)
RUN: dict[str, Any] = {"federation": "sea", "run": "a" * 32}


def part(number: int) -> AdapterState:
    return AdapterState(SCHEMA, torch.arange(30, dtype=torch.float32) + number)


def kept(store: PersonalStore, until: int, **other: Any) -> AdapterState | None:
    return store.newest(SCHEMA, **(RUN | other), until=until)


def number_of(store: PersonalStore, until: int, **other: Any) -> int | None:
    found = kept(store, until, **other)
    return None if found is None else int(found.values[0])


def keep(store: PersonalStore, *rounds: int) -> None:
    for number in rounds:
        store.keep(part(number), **RUN, round=number)


def files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.rglob("*") if path.is_file())


@pytest.fixture(params=["folder", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> PersonalStore:
    return PersonalStore(tmp_path if request.param == "folder" else None)


# Damage


def damage_bytes(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def claims(path: Path, **changes: str) -> None:
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["about"])
    save_file(load_file(path), path, {"about": json.dumps(about | changes)})


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda path: path.write_bytes(b""), "it cannot be read"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "it cannot be read"),
        (lambda path: damage_bytes(path, -1), "its values were changed"),
        (lambda path: claims(path, sha256="b" * 64), "its values were changed"),
        (
            lambda path: save_file(load_file(path), path, {"about": "[1]"}),
            "it is of another schema",
        ),
        (lambda path: claims(path, round="3"), "it is of another round"),
        (lambda path: claims(path, federation="lake"), "it is of another federation"),
        (lambda path: claims(path, run="7"), "it is of another run"),
        (lambda path: claims(path, schema="2"), "it is of another schema"),
        (lambda path: claims(path, adapter="b" * 64), "it is of another adapter"),
        (lambda path: save_file(load_file(path), path), "it is of another schema, federation"),
        (
            lambda path: save_file({"m.0.lora_B.weight": torch.zeros(5, 3)}, path),
            "it cannot be read",
        ),
    ],
)
def test_a_damaged_file_is_told_and_never_replaced_by_nothing(
    damage: Any, told: str, tmp_path: Path
):
    keep(PersonalStore(tmp_path), 3, 4)
    damage(tmp_path / "sea" / RUN["run"] / "4.safetensors")
    with pytest.raises(StorageError, match=rf"4\.safetensors cannot be used: {told}.*restore"):
        kept(PersonalStore(tmp_path), 4)
    assert number_of(PersonalStore(tmp_path), 3) == 3


def test_another_rank_than_was_kept_is_told(tmp_path: Path):
    store = PersonalStore(tmp_path)
    keep(store, 1)
    with pytest.raises(StorageError, match="cannot be used"):
        store.newest(SCHEMA.of_rank(2), **RUN, until=1)


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StorageError, match="cannot write"):
        keep(PersonalStore(tmp_path / "file"), 1)


# What is found


def test_nothing_was_kept_before_the_first_round(store: PersonalStore):
    assert kept(store, 99) is None
    keep(store, 1)
    assert kept(store, 0) is None


@pytest.mark.parametrize("other", [{"federation": "lake"}, {"run": "7" * 32}], ids=str)
def test_another_run_has_its_own(other: dict[str, Any], store: PersonalStore):
    keep(store, 1)
    assert kept(store, 1, **other) is None
    store.keep(part(50), **(RUN | other), round=1)
    assert number_of(store, 1) == 1
    assert number_of(store, 1, **other) == 50


def test_the_newest_round_that_is_not_too_new_is_found(store: PersonalStore):
    keep(store, 2, 5)
    assert [number_of(store, until) for until in (1, 2, 4, 5, 9)] == [None, 2, 2, 5, 5]


def test_a_repeated_round_begins_where_the_one_before_ended(store: PersonalStore):
    keep(store, 1, 2)
    store.keep(part(20), **RUN, round=2)
    assert number_of(store, 1) == 1
    assert number_of(store, 2) == 20


def test_two_rounds_are_kept(store: PersonalStore):
    keep(store, *range(1, 12))
    assert [number_of(store, until) for until in (9, 10, 11)] == [None, 10, 11]


def test_what_came_after_a_repeated_round_is_void(store: PersonalStore):
    keep(store, 3, 4, 5)
    store.keep(part(30), **RUN, round=4)
    assert number_of(store, 99) == 30


def test_a_restart_finds_the_same_bits_in_private_files(tmp_path: Path):
    keep(PersonalStore(tmp_path), 1, 2, 3)
    found = kept(PersonalStore(tmp_path), 3)
    assert found is not None
    assert torch.equal(found.values, part(3).values)
    assert files(tmp_path) == ["2.safetensors", "3.safetensors"]
    for path in tmp_path.rglob("*.safetensors"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_files_of_others_in_the_folder_are_left_alone(tmp_path: Path):
    folder = tmp_path / "sea" / RUN["run"]
    folder.mkdir(parents=True)
    for name in ("notes.txt", "old.safetensors", "3.safetensors.bak"):
        (folder / name).write_text("")
    store = PersonalStore(tmp_path)
    keep(store, 1, 2, 3)
    assert number_of(store, 3) == 3
    assert {"notes.txt", "old.safetensors", "3.safetensors.bak"} <= set(files(tmp_path))


def test_memory_is_not_touched_by_what_is_done_with_a_part(store: PersonalStore):
    keep(store, 1)
    found = kept(store, 1)
    assert found is not None
    whole = AdapterState(SCHEMA, torch.zeros(SCHEMA.numel)).with_part(found)
    whole.values.fill_(-1)
    assert number_of(store, 1) == 1
    assert dataclasses.replace(SCHEMA).hash == found.schema.hash
