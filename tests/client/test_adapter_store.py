"""The versions of the adapter on a box: never lost, never mixed up, whatever happens meanwhile."""

import json
import multiprocessing
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedpeft.adapters import AdapterSchema, AdapterState, TensorSpec, load_adapter, save_adapter
from fedpeft.adapters.peft_directory import WEIGHTS_FILE
from fedpeft.config import AdapterSettings
from fedpeft.errors import AdapterError, StorageError, UnknownAdapter
from fedpeft_client.folder_lock import locked
from fedpeft_client.settings import StoreSettings
from fedpeft_client.versions.acceptance import Verdict
from fedpeft_client.versions.store import AdapterStore
from fedpeft_client.versions.version import Arrival, Version

SCHEMA = AdapterSchema(
    (
        TensorSpec("base_model.m.lora_A.weight", (2, 4)),
        TensorSpec("base_model.m.lora_B.weight", (3, 2)),
    ),
    "a" * 64,
)
LORA = AdapterSettings(rank=2)


def arrival(number: int, value: float | None = None, **changes: Any) -> Arrival:
    fill = float(number) if value is None else value
    fields: dict[str, Any] = {
        "state": AdapterState(SCHEMA, torch.full((SCHEMA.numel,), fill)),
        "settings": LORA,
        "base_name": "base",
        "federation": "sea",
        "run": "1" * 32,
        "round": number,
    }
    return Arrival(**(fields | changes))


def verdict(store: AdapterStore, accepted: bool = True) -> Verdict:
    return Verdict(accepted=accepted, reason="of the test", rival=store.in_use_name())


def keep(store: AdapterStore, number: int, *, accepted: bool = True, **changes: Any) -> Version:
    return store.keep(arrival(number, **changes), verdict(store, accepted))


def value_of(path: Path) -> float:
    return float(load_adapter(path, SCHEMA).values[0])


def names(store: AdapterStore) -> list[str]:
    return [version.name for version in store.versions()]


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path / "box" / "adapters")


@pytest.fixture
def three(store: AdapterStore) -> AdapterStore:
    """Rounds 1 to 3, of which the last is in use."""
    for number in (1, 2, 3):
        keep(store, number)
    return store


def earlier(store: AdapterStore, value: float) -> None:
    """Lay the folder of a release before the store."""
    state = AdapterState(SCHEMA, torch.full((SCHEMA.numel,), value))
    save_adapter(state, LORA, store.link, base_name="base")


# What is refused


def test_an_unknown_adapter_is_refused_and_those_that_are_there_are_named(three: AdapterStore):
    for do in (three.find, three.use, three.pin, three.unpin, three.remove):
        for name in ("round-9", "", ".", "..", "../box", "index.json", ".lock"):
            with pytest.raises(UnknownAdapter, match="it has base, round-1, round-2, round-3"):
                do(name)


def test_of_an_empty_store_nothing_can_be_found_or_rolled_back(store: AdapterStore):
    assert store.versions() == []
    assert store.in_use() is None
    assert store.catalogue().default is None
    with pytest.raises(UnknownAdapter, match="only the base model"):
        store.find()
    with pytest.raises(UnknownAdapter, match="nothing to go back to"):
        store.rollback()
    assert not store.link.is_symlink()


def test_the_version_in_use_or_pinned_is_not_removed(three: AdapterStore):
    three.pin("round-1")
    with pytest.raises(AdapterError, match="round-3 is in use"):
        three.remove("round-3")
    with pytest.raises(AdapterError, match="round-1 is pinned"):
        three.remove("round-1")
    assert names(three) == ["round-1", "round-2", "round-3"]


@pytest.mark.parametrize("file", [WEIGHTS_FILE, "adapter_config.json", "fedpeft.json"])
def test_a_damaged_version_is_refused_and_can_be_removed(file: str, three: AdapterStore):
    path = three.find("round-2").path / file
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    for do in (three.find, three.use):
        with pytest.raises(AdapterError, match=rf"round-2 is damaged: .*{file} is not the file"):
            do("round-2")
    assert list(three.damaged()) == ["round-2"]
    assert sorted(three.catalogue().adapters) == ["round-1", "round-3"]
    with pytest.raises(AdapterError, match="round-2 is damaged"):
        three.rollback()
    assert three.in_use_name() == "round-3"
    three.remove("round-2")
    assert three.rollback() == "round-1"


def test_a_damaged_version_in_use_is_never_replaced_in_silence(three: AdapterStore):
    (three.find().path / WEIGHTS_FILE).unlink()
    for do in (three.find, three.catalogue):
        with pytest.raises(AdapterError, match="round-3 is damaged"):
            do()
    three.remove("round-3")
    assert three.find().name == "round-2"


@pytest.mark.parametrize("text", ["", "{", '{"schema": 2}', "[]"])
def test_a_version_that_does_not_say_what_it_is_is_left_out(text: str, three: AdapterStore):
    (three.directory / "round-2" / "about.json").write_text(text)
    assert names(three) == ["round-1", "round-3"]
    assert "about.json is missing or damaged" in three.damaged()["round-2"]
    three.remove("round-2")
    assert three.damaged() == {}


@pytest.mark.parametrize("text", ["", "[]", '{"schema": 2}', '{"schema": 1, "history": []}'])
def test_a_damaged_index_is_refused_and_the_adapters_stay(text: str, three: AdapterStore):
    (three.directory / "index.json").write_text(text)
    for do in (three.find, three.versions, three.rollback, lambda: keep(three, 4)):
        with pytest.raises(StorageError, match="unknown which adapter is in use"):
            do()
    (three.directory / "index.json").unlink()
    three.use("round-2")
    assert value_of(three.link) == 2


def test_a_folder_in_the_way_of_the_link_is_not_touched(store: AdapterStore):
    store.link.mkdir(parents=True)
    (store.link / "notes.txt").write_text("mine")
    with pytest.raises(StorageError, match="in the way"):
        keep(store, 1)
    assert (store.link / "notes.txt").read_text() == "mine"


def test_a_disk_that_is_full_leaves_what_was_there(
    three: AdapterStore, monkeypatch: pytest.MonkeyPatch
):
    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match="no space left"):
            keep(three, 4)
    assert names(three) == ["round-1", "round-2", "round-3"]
    assert [path.name for path in three.directory.glob(".half-*")] == []
    assert value_of(three.link) == 3


# Names


def test_a_name_never_stands_for_another_adapter(store: AdapterStore):
    first = keep(store, 7)
    other_run = keep(store, 7, value=8.0, run="2" * 32)
    repeated = keep(store, 7, value=9.0)
    again = keep(store, 7, value=9.5)
    assert first.name == "round-7"
    assert other_run.name == "round-7-22222222"
    assert repeated.name == "round-7-11111111"
    assert again.name == f"round-7-11111111-{again.digest[:16]}"
    assert value_of(store.find("round-7").path) == 7
    store.use(first.name)
    store.remove(other_run.name)
    assert keep(store, 7, value=1.0, run="2" * 32, accepted=False).name != other_run.name


def test_the_same_adapter_of_the_same_round_is_stored_once(store: AdapterStore):
    assert keep(store, 7, accepted=False).name == keep(store, 7).name == "round-7"
    assert names(store) == ["round-7"]
    assert store.find().verdict.accepted
    store.use("base")
    store.remove("round-7")
    assert keep(store, 7).name == "round-7"


def test_the_version_in_use_stays_in_use_when_it_comes_again_and_is_judged_otherwise(
    three: AdapterStore,
):
    again = keep(three, 3, accepted=False)
    assert three.find().name == again.name == "round-3"
    assert again.verdict.accepted


# What is in use


def test_an_accepted_adapter_is_in_use_and_another_is_kept_beside_it(store: AdapterStore):
    keep(store, 1)
    refused = keep(store, 2, accepted=False)
    assert store.find().name == "round-1"
    assert store.find("round-2").verdict == refused.verdict
    assert value_of(store.link) == 1
    found = store.catalogue()
    assert (found.default, sorted(found.adapters)) == ("round-1", ["round-1", "round-2"])
    assert value_of(found.adapters["round-2"]) == 2


def test_what_people_chose_while_an_adapter_was_judged_stays(three: AdapterStore):
    judged = verdict(three)
    three.use("round-1")
    version = three.keep(arrival(4), judged)
    assert not version.verdict.accepted
    assert "round-1 was chosen here while it was compared with round-3" in version.verdict.reason
    assert three.find().name == "round-1"


def test_rolling_back_goes_further_each_time(three: AdapterStore):
    three.use("round-1")
    assert [three.rollback() for _ in range(3)] == ["round-3", "round-2", "round-1"]
    assert value_of(three.link) == 1
    assert three.rollback() == "base"
    assert three.in_use() is None
    assert not three.link.is_symlink()
    with pytest.raises(UnknownAdapter, match="nothing was in use on this box before base"):
        three.rollback()


def test_rolling_back_skips_what_was_removed(three: AdapterStore):
    three.remove("round-2")
    assert three.rollback() == "round-1"


def test_the_base_model_alone_can_be_used(three: AdapterStore):
    three.use("base")
    assert three.in_use() is None
    assert three.catalogue().default is None
    assert three.rollback() == "round-3"
    assert value_of(three.link) == 3


def test_the_link_leads_to_the_adapter_in_use_wherever_the_box_is_moved(
    three: AdapterStore, tmp_path: Path
):
    three.use("round-2")
    box = three.directory.parent.rename(tmp_path / "moved")
    assert value_of(box / "adapter") == 2


def test_lineage_lies_beside_the_weights_and_the_verdict_does_not(store: AdapterStore):
    version = keep(store, 1, lineage=b'{"schema": 1}')
    assert sorted(path.name for path in version.path.iterdir()) == [
        "adapter_config.json",
        WEIGHTS_FILE,
        "fedpeft.json",
        "lineage.json",
    ]
    assert (version.path / "lineage.json").read_bytes() == b'{"schema": 1}'
    assert "of the test" in (version.folder / "about.json").read_text()


# Quota


def test_the_oldest_go_first_and_never_those_in_use_or_before_it_or_pinned(store: AdapterStore):
    small = AdapterStore(store.directory, StoreSettings(max_versions=3))
    keep(small, 1)
    keep(small, 2, accepted=False)
    small.pin("round-2")
    for number in (3, 4, 5):
        keep(small, number, accepted=False)
    assert names(small) == ["round-1", "round-2", "round-5"]
    small.unpin("round-2")
    keep(small, 6)
    assert names(small) == ["round-1", "round-5", "round-6"]
    assert small.rollback() == "round-1"
    small.use("round-6")
    small.use("round-5")
    keep(small, 7)
    assert names(small) == ["round-5", "round-6", "round-7"]
    assert [small.rollback(), small.rollback(), small.rollback()] == ["round-5", "round-6", "base"]


def test_the_quota_counts_bytes_too(store: AdapterStore):
    large = AdapterSchema(
        (
            TensorSpec("base_model.m.lora_A.weight", (2, 60_000)),
            TensorSpec("base_model.m.lora_B.weight", (60_000, 2)),
        ),
        "a" * 64,
    )
    small = AdapterStore(store.directory, StoreSettings(max_mb=2))
    for number in range(1, 5):
        state = AdapterState(large, torch.full((large.numel,), float(number)))
        assert 0.9e6 < keep(small, number, state=state).size_bytes < 1.1e6
    assert names(small) == ["round-3", "round-4"]


# From a release before the store


def test_the_folder_of_an_earlier_release_becomes_the_version_in_use(store: AdapterStore):
    earlier(store, 5.0)
    assert store.find().name == "earlier"
    assert store.link.is_symlink()
    assert value_of(store.link) == 5
    keep(store, 1)
    assert store.rollback() == "earlier"
    assert value_of(store.link) == 5


def test_a_folder_laid_over_the_link_does_not_replace_what_was_taken_over(store: AdapterStore):
    earlier(store, 5.0)
    assert store.find().name == "earlier"
    store.link.unlink()
    earlier(store, 6.0)
    with pytest.raises(StorageError, match="is a folder where a link"):
        store.find()
    assert value_of(store.link) == 6


# Killed at any moment

_BEFORE = ("fsync", "rename", "replace", "symlink", "unlink", "rmdir", "mkdir")


def _killed(action: Callable[[], object], at: int) -> bool:
    """Run ``action`` in a child that dies at its ``at``-th change of the disk; say if it did."""
    child = os.fork()
    if not child:
        left = at

        def dying(change: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(*arguments: Any, **named: Any) -> Any:
                nonlocal left
                left -= 1
                if left < 0:
                    os._exit(9)
                return change(*arguments, **named)

            return wrapped

        for name in _BEFORE:
            setattr(os, name, dying(getattr(os, name)))
        try:
            action()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def _action(store: AdapterStore, name: str) -> Callable[[], object]:
    actions: dict[str, Callable[[], object]] = {
        "keep": lambda: keep(store, 4),
        "use": lambda: store.use("round-1"),
        "rollback": store.rollback,
        "remove": lambda: store.remove("round-1"),
        "prune": lambda: keep(AdapterStore(store.directory, StoreSettings(max_versions=3)), 4),
    }
    return actions[name]


@pytest.mark.parametrize("name", ["keep", "use", "rollback", "remove", "prune"])
def test_a_kill_at_any_moment_leaves_a_store_that_works(
    name: str, three: AdapterStore, tmp_path: Path
):
    keep(three, 3)
    at = 0
    while True:
        box = shutil.copytree(tmp_path / "box", tmp_path / f"{name}-{at}", symlinks=True)
        store = AdapterStore(box / "adapters")
        died = _killed(_action(store, name), at)
        before = set(names(store))
        assert {"round-2", "round-3"} <= before or name == "prune"
        assert "round-3" in before or store.in_use_name() == "round-4"
        assert value_of(store.find().path) == int(store.find().name[-1])
        assert store.damaged() == {}
        # The link may lag behind by one step; the next change mends it.
        assert value_of(store.link) in {1, 2, 3, 4}
        assert keep(store, 5).name == "round-5"
        assert value_of(store.link) == 5
        assert {path.name for path in store.directory.iterdir()} == {
            *names(store),
            "index.json",
            ".lock",
        }
        if not died:
            break
        at += 1
    assert at > 3


def test_a_kill_while_the_earlier_folder_is_taken_over_loses_nothing(tmp_path: Path):
    at = 0
    while True:
        store = AdapterStore(tmp_path / str(at) / "adapters")
        earlier(store, 5.0)
        died = _killed(store.in_use_name, at)
        assert store.find().name == "earlier"
        keep(store, 1)
        assert store.rollback() == "earlier"
        assert value_of(store.link) == 5
        if not died:
            break
        at += 1
    assert at > 3


# Two at once


def test_who_holds_the_lock_is_waited_for_and_not_for_ever(tmp_path: Path):
    with (
        locked(tmp_path),
        pytest.raises(StorageError, match="another program has been changing"),
        locked(tmp_path, wait_s=0.1),
    ):
        pass
    with locked(tmp_path, wait_s=0):
        pass


def _keep_many(directory: Path, run: str) -> None:
    store = AdapterStore(directory)
    for number in range(1, 6):
        keep(store, number, run=run * 32, value=float(run) * 10 + number, accepted=False)


def test_two_processes_lose_nothing_of_each_other(store: AdapterStore):
    context = multiprocessing.get_context("fork")
    children = [
        context.Process(target=_keep_many, args=(store.directory, run)) for run in ("1", "2")
    ]
    for child in children:
        child.start()
    while any(child.is_alive() for child in children):
        store.catalogue()
    for child in children:
        child.join()
        assert child.exitcode == 0
    values = {value_of(version.path) for version in store.versions()}
    assert values == {float(run * 10 + number) for run in (1, 2) for number in range(1, 6)}
    index = json.loads((store.directory / "index.json").read_text())
    assert len(index["given"]) == len(set(index["given"].values())) == 10
