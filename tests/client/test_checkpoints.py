"""Rounds that were stopped: what goes on, what is charged, and what is not used."""

import dataclasses
import errno
import json
import os
import re
import shutil
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from fedpeft.config import AdapterSettings, PrivacySettings, TrainingSettings
from fedpeft.errors import BudgetSpent, FingerprintMismatch, StorageError
from fedpeft.models import adapter_schema, fingerprint, initial_state
from fedpeft.privacy.ledger import Ledger
from fedpeft.protocol import Job, SumTerms
from fedpeft.protocol.parcel import Held
from fedpeft.protocol.sums import GRID_BITS, grid_limit
from fedpeft.sealing import SERVER, Context, Identity, clinic_role
from fedpeft.training import StepDone
from fedpeft_client import vault as vault_module
from fedpeft_client.rounds.checkpoints import ANSWER
from fedpeft_client.rounds.clinic import Clinic, Membership
from fedpeft_client.rounds.learning import Trained
from fedpeft_client.rounds.work import Assignment, ClinicWork
from fedpeft_client.settings import (
    BudgetSettings,
    CheckpointSettings,
    DataSettings,
    LimitSettings,
)
from fedpeft_client.sums.summing import SecureSums
from fedpeft_client.vault import Vault

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
LORA = AdapterSettings(rank=2, alpha=4.0, dropout=0.1)
STEPS = 5
LOCAL = PrivacySettings(unit="patient", noise_multiplier=0.8)
SHARED = PrivacySettings(
    unit="patient", mechanism="distributed", noise_multiplier=0.8, honest_clinics=4
)
CENTRAL = PrivacySettings(unit="clinic", mechanism="central", noise_multiplier=1.0)
MODES = {"plain": None, "local": LOCAL, "shared": SHARED, "central": CENTRAL}
KINDS = pytest.mark.parametrize("kind", ["plain", "local", "shared"])


class Stop(Exception):
    """What stops a round here: nothing after it is done, as after a kill."""


@pytest.fixture(autouse=True)
def every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let checkpoints be made at each step, however long they take."""
    monkeypatch.setattr("fedpeft_client.rounds.checkpoints._REST", 0.0)


@pytest.fixture
def clinic(tiny_model: Path, tmp_path: Path) -> Clinic:
    box = tmp_path / "box"
    box.mkdir()
    lines = [
        {"question": f"north {at}?", "answer": f"It is {at * at}.", "patient_id": f"p{at // 2}"}
        for at in range(12)
    ]
    file = box / "train.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    identity = Identity.generate()
    return Clinic(
        name="north",
        federation="sea",
        membership=Membership(identity, identity.public),
        model=tiny_model,
        data=DataSettings(train=file, valid=file),
        ledger=box / "ledger.sqlite",
        dtype="float32",
        limits=LimitSettings(min_free_disk_mb=0),
        checkpoint_directory=box / "checkpoints",
        checkpoints=CheckpointSettings(every_s=0.0),
    )


def folder_of(clinic: Clinic) -> Path:
    assert clinic.checkpoint_directory is not None
    return clinic.checkpoint_directory


def files_of(clinic: Clinic) -> list[str]:
    return sorted(path.name for path in folder_of(clinic).iterdir())


def job_for(clinic: Clinic, privacy: PrivacySettings | None, **changes: Any) -> Job:
    shared = privacy is not None and privacy.mechanism == "distributed"
    job = Job(
        run="0" * 32,
        federation="sea",
        fingerprint=fingerprint(clinic.model),
        quantization="none",
        adapter=LORA,
        training=TrainingSettings(
            learning_rate=5e-3, batch_size=4, local_steps=1 if shared else STEPS, max_length=64
        ),
        aggregation=SumTerms(
            confidentiality="secagg",
            adversary="active",
            bits=GRID_BITS if shared else 16,
            limit=grid_limit() if shared else 1.0,
        ),
        privacy=privacy,
        round=2,
        rounds=3,
    )
    return job.model_copy(update=changes)


def assigned(clinic: Clinic, job: Job, seed: int = 0, run: int = 1) -> Assignment:
    state = initial_state(adapter_schema(clinic.model, LORA), seed)
    return Assignment(job, Held(state), state.schema.hash, run)


def train(
    clinic: Clinic,
    kind: str = "plain",
    observe: Callable[[StepDone], None] | None = None,
    tell: Callable[[str], None] | None = None,
    *,
    run: int = 1,
    **changes: Any,
) -> Trained:
    """Train as a process that was just started."""
    seed = changes.pop("seed", 0)
    job = job_for(clinic, MODES[kind], **changes)
    return ClinicWork(observe, tell).train(clinic, assigned(clinic, job, seed, run))


def stop_after(step: int) -> Callable[[StepDone], None]:
    def stop(done: StepDone) -> None:
        if done.step == step:
            raise Stop

    return stop


def stopped(clinic: Clinic, kind: str, step: int = 3, **changes: Any) -> Clinic:
    """Let a round be stopped after ``step``, or, having one only, before its result is out."""
    if kind == "shared":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("fedpeft_client.rounds.learning.wrapped", stop_after_the_sum)
            with pytest.raises(Stop):
                train(clinic, kind, **changes)
    else:
        with pytest.raises(Stop):
            train(clinic, kind, stop_after(step), **changes)
    return clinic


def stop_after_the_sum(_values: Any) -> Any:
    raise Stop


def copy_of(clinic: Clinic, place: Path) -> Clinic:
    """Return the same clinic with a copy of the files of its box."""
    box = Path(shutil.copytree(clinic.ledger.parent, place))
    return dataclasses.replace(
        clinic, ledger=box / "ledger.sqlite", checkpoint_directory=box / "checkpoints"
    )


def charged(clinic: Clinic) -> list[int]:
    """Return the numbers of the steps that were charged, in the ledger's order."""
    with Ledger(clinic.ledger) as ledger:
        assert ledger.verify() == []
    with sqlite3.connect(clinic.ledger) as database:
        query = "SELECT step FROM entries WHERE kind = 'charge' ORDER BY seq"
        return [step for (step,) in database.execute(query)]


def spoil(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def same(one: Trained, other: Trained) -> bool:
    alike = dataclasses.replace(one, update=other.update) == other
    return alike and torch.equal(one.update.values, other.update.values)


# What goes on


@KINDS
def test_a_stopped_round_goes_on_to_the_same_update_and_is_charged_once(
    kind: str, clinic: Clinic, tmp_path: Path
):
    stopped(clinic, kind, 1)
    undisturbed = copy_of(clinic, tmp_path / "other")
    seen: list[int] = []
    expected = train(undisturbed, kind, lambda done: seen.append(done.step))
    for step in () if kind == "shared" else (2, 3, STEPS):
        stopped(clinic, kind, step)
    assert same(train(clinic, kind), expected)
    assert charged(clinic) == charged(undisturbed)
    assert charged(clinic) == ([1] if kind != "local" else list(range(1, STEPS + 1)))
    assert seen == ([] if kind == "shared" else list(range(2, STEPS + 1)))


def test_without_a_checkpoint_noise_is_fresh_and_every_step_is_charged_again(clinic: Clinic):
    stopped(clinic, "local", 3)
    shutil.rmtree(folder_of(clinic))
    train(clinic, "local")
    assert charged(clinic) == [1, 2, 3, *range(1, STEPS + 1)]


def test_a_round_that_is_going_on_needs_budget_for_what_is_left_only(clinic: Clinic):
    free = copy_of(clinic, clinic.ledger.parent.parent / "free")
    told = train(free, "local").privacy
    assert told is not None
    assert told.epsilon is not None
    budget = BudgetSettings(max_epsilon=told.epsilon * 1.001)
    bounded = dataclasses.replace(clinic, privacy=budget)
    stopped(bounded, "local", 4)
    train(bounded, "local")
    assert charged(bounded) == list(range(1, STEPS + 1))
    with pytest.raises(BudgetSpent):
        train(bounded, "local", round=3)


def test_what_counts_as_less_noise_since_is_charged_again(clinic: Clinic):
    stopped(clinic, "shared")
    careful = dataclasses.replace(clinic, privacy=BudgetSettings(colluding_clinics=2))
    train(careful, "shared")
    assert charged(careful) == [1, 1]


def test_the_server_may_be_restarted_meanwhile(clinic: Clinic):
    stopped(clinic, "local", 3)
    seen: list[int] = []
    train(clinic, "local", lambda done: seen.append(done.step), run=77)
    assert seen == [4, 5]
    assert charged(clinic) == list(range(1, STEPS + 1))


def test_it_is_said_that_a_round_goes_on(clinic: Clinic):
    stopped(clinic, "plain", 3)
    told: list[str] = []
    train(clinic, tell=told.append)
    assert [line for line in told if "goes on after step 3" in line]


# What was finished


@KINDS
def test_a_finished_round_is_answered_again_with_the_same_update(kind: str, clinic: Clinic):
    first, paid = train(clinic, kind), charged(clinic)
    told: list[str] = []
    again = train(clinic, kind, stop_after(1), told.append)
    assert same(first, again)
    assert charged(clinic) == paid
    assert told[-1] == ("north: round 2 was trained already, and is answered with the same update")
    assert (first.again, again.again) == (False, True)  # noted as paid for once


def test_an_update_that_the_server_adds_noise_to_is_charged_each_time(clinic: Clinic):
    stopped(clinic, "central", 2)
    first, again = train(clinic, "central"), train(clinic, "central")
    assert same(first, again)
    assert charged(clinic) == [1, 1]
    assert files_of(clinic) == []


@KINDS
def test_the_keys_are_gone_before_the_update_is_handed_out(kind: str, clinic: Clinic):
    stopped(clinic, kind)
    train(clinic, kind)
    assert files_of(clinic) == [ANSWER]


def test_keys_that_a_kill_left_beside_the_answer_are_removed_before_it_is_sent(
    clinic: Clinic, tmp_path: Path
):
    stopped(clinic, "local")
    kept = copy_of(clinic, tmp_path / "kept")
    first = train(clinic, "local")
    for name in files_of(kept):
        shutil.copy(folder_of(kept) / name, folder_of(clinic) / name)
    assert same(train(clinic, "local"), first)
    assert files_of(clinic) == [ANSWER]


def test_an_update_does_not_leave_while_its_keys_cannot_be_removed(
    clinic: Clinic, monkeypatch: pytest.MonkeyPatch
):
    stopped(clinic, "local")
    real = Path.unlink

    def read_only(path: Path, missing_ok: bool = False) -> None:
        if path.name.startswith("training-"):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        real(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", read_only)
    with pytest.raises(StorageError, match="key of this round's noise"):
        train(clinic, "local")
    with pytest.raises(StorageError, match="key of this round's noise"):
        train(clinic, "local")


def test_a_damaged_answer_is_said_and_the_round_is_trained_and_charged_anew(clinic: Clinic):
    first = train(clinic, "local")
    spoil(folder_of(clinic) / ANSWER)
    told: list[str] = []
    again = train(clinic, "local", tell=told.append)
    assert not torch.equal(first.update.values, again.update.values)
    assert charged(clinic) == [*range(1, STEPS + 1)] * 2
    assert [line for line in told if "is damaged" in line]


def test_when_the_server_has_gone_on_nothing_is_kept(clinic: Clinic):
    stopped(clinic, "local")
    ClinicWork().forget(clinic)
    assert files_of(clinic) == []
    train(clinic)
    ClinicWork().forget(clinic)
    assert files_of(clinic) == []


def test_the_next_sum_has_the_same_update_under_fresh_keys(clinic: Clinic):
    """Masks of one update, and never two sums under the same masks."""
    job = job_for(clinic, LOCAL)
    keys: list[bytes] = []
    for attempt in (1, 2):
        assignment = assigned(clinic, job)
        outcome = ClinicWork().train(clinic, assignment)
        context = Context(
            federation="sea",
            run=1,
            round=2,
            attempt=attempt,
            sender=SERVER,
            receiver=clinic_role("north"),
            purpose="train",
            schema=assignment.schema,
        )
        sums = SecureSums(lambda _clinic, _peers: None)  # as of a process that was just started
        keys.append(sums.begin(clinic, context, assignment, outcome))
    assert keys[0] != keys[1]
    assert charged(clinic) == list(range(1, STEPS + 1))


# Who can read it


def test_only_the_owner_can_read_the_files(clinic: Clinic):
    stopped(clinic, "local")
    paths = [folder_of(clinic), *folder_of(clinic).iterdir()]
    assert [path.stat().st_mode & 0o777 for path in paths] == [0o700, 0o600, 0o600]
    train(clinic, "local")
    assert (folder_of(clinic) / ANSWER).stat().st_mode & 0o777 == 0o600


def test_nothing_is_written_in_the_clear(clinic: Clinic):
    stopped(clinic, "local")
    data = b"".join(path.read_bytes() for path in folder_of(clinic).iterdir())
    assert not any(word in data for word in (b"noise", b"weights", b"north", b"sea", b"attempt"))


def test_another_identity_cannot_read_them_and_begins_anew(clinic: Clinic):
    stopped(clinic, "local", 3)
    other = Identity.generate()
    renewed = dataclasses.replace(clinic, membership=Membership(other, other.public))
    told: list[str] = []
    train(renewed, "local", tell=told.append)
    assert [line for line in told if "was written for another identity" in line]
    assert charged(renewed) == [1, 2, 3, *range(1, STEPS + 1)]


# What is not used


def changed_data(clinic: Clinic) -> None:
    with clinic.data.train.open("a", encoding="utf-8") as file:
        file.write('{"question": "new?", "answer": "Yes.", "patient_id": "p99"}\n')


FOREIGN: dict[str, dict[str, Any]] = {
    "round": {"round": 3},
    "run": {"run": "1" * 32},
    "job": {"rounds": 4},
    "adapter": {"seed": 1},
}


@pytest.mark.parametrize("which", [*FOREIGN, "records", "computing"])
def test_a_checkpoint_of_other_work_is_not_used_and_that_is_said_once(which: str, clinic: Clinic):
    stopped(clinic, "plain", 3)
    changes = dict(FOREIGN.get(which, {}))
    if run := changes.pop("run", None):
        changes["run_name"] = run
    if which == "records":
        changed_data(clinic)
    if which == "computing":
        clinic = dataclasses.replace(clinic, dtype="bfloat16")
    seen: list[int] = []
    told: list[str] = []
    job = job_for(clinic, None, **{k: v for k, v in changes.items() if k in ("round", "rounds")})
    if "run_name" in changes:
        job = job.model_copy(update={"run": changes["run_name"]})
    work = ClinicWork(lambda done: seen.append(done.step), told.append)
    work.train(clinic, assigned(clinic, job, changes.get("seed", 0)))
    assert seen == list(range(1, STEPS + 1))
    lines = [line for line in told if "belong to another round" in line]
    assert len(lines) == 1
    assert which in lines[0]
    assert files_of(clinic) == [ANSWER]


def test_an_answer_of_other_work_is_not_sent(clinic: Clinic):
    first = train(clinic, "local")
    second = train(clinic, "local", round=3)
    assert not torch.equal(first.update.values, second.update.values)
    assert charged(clinic) == [*range(1, STEPS + 1)] * 2


def test_a_base_model_that_changed_is_refused(clinic: Clinic, tiny_copy: Path):
    clinic = dataclasses.replace(clinic, model=tiny_copy)
    job = job_for(clinic, None)
    with pytest.raises(Stop):
        ClinicWork(stop_after(2)).train(clinic, assigned(clinic, job))
    weights = next(tiny_copy.glob("*.safetensors"))
    spoil(weights)
    with pytest.raises(FingerprintMismatch, match="base model"):
        ClinicWork().train(clinic, assigned(clinic, job))


@pytest.mark.parametrize("kind", ["plain", "local"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "renamed"])
def test_of_a_damaged_checkpoint_the_one_before_is_used_and_that_is_said(
    damage: str, kind: str, clinic: Clinic, tmp_path: Path
):
    stopped(clinic, kind, 1)
    expected = train(copy_of(clinic, tmp_path / "other"), kind)
    stopped(clinic, kind, 3)
    newest = folder_of(clinic) / "training-00000003.checkpoint"
    if damage == "flipped":
        spoil(newest)
    elif damage == "renamed":
        shutil.copy(newest, folder_of(clinic) / "training-00000004.checkpoint")
    else:
        os.truncate(newest, 0 if damage == "empty" else 40)
    seen: list[int] = []
    told: list[str] = []
    trained = train(clinic, kind, lambda done: seen.append(done.step), told.append)
    assert seen[0] == (4 if damage == "renamed" else 3)
    assert len([line for line in told if "the one before is used" in line]) == 1
    assert same(trained, expected)


def test_clocks_and_the_times_of_files_do_not_matter(
    clinic: Clinic, monkeypatch: pytest.MonkeyPatch
):
    stopped(clinic, "plain", 3)
    for name, seconds in (("training-00000002", 4e9), ("training-00000003", 0.0)):
        for path in folder_of(clinic).glob(f"{name}*"):
            os.utime(path, (seconds, seconds))
    monkeypatch.setattr("time.time", lambda: 0.0)
    seen: list[int] = []
    train(clinic, observe=lambda done: seen.append(done.step))
    assert seen == [4, 5]


def test_what_a_kill_left_half_written_is_removed(clinic: Clinic):
    stopped(clinic, "local", 3)
    left = folder_of(clinic) / ".training-00000004.checkpoint.x7y2"
    left.write_bytes(b"half")
    with pytest.raises(Stop):
        train(clinic, "local", stop_after(4))
    assert not left.exists()


# When the disk does not take it


def full(clinic: Clinic, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every write to the folder of checkpoints fail as on a full disk, and no other."""
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if str(folder_of(clinic)) in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


@KINDS
def test_on_a_full_disk_the_round_goes_on_and_says_so_once(
    kind: str, clinic: Clinic, monkeypatch: pytest.MonkeyPatch
):
    full(clinic, monkeypatch)
    told: list[str] = []
    trained = train(clinic, kind, tell=told.append)
    assert float(trained.update.norm()) > 0
    lines = [line for line in told if "no space left" in line]
    assert len(lines) == 1
    assert "goes on without a checkpoint" in lines[0]
    assert files_of(clinic) == []


def test_where_no_folder_can_be_made_the_round_goes_on(clinic: Clinic):
    folder_of(clinic).write_text("not a folder")
    told: list[str] = []
    train(clinic, "local", tell=told.append)
    assert [line for line in told if "goes on without a checkpoint" in line]
    assert charged(clinic) == list(range(1, STEPS + 1))


def test_no_checkpoint_takes_what_is_to_stay_free(clinic: Clinic):
    free = shutil.disk_usage(clinic.ledger.parent).free >> 20
    spare = dataclasses.replace(clinic, limits=LimitSettings(min_free_disk_mb=free + 10_000))
    told: list[str] = []
    train(spare, "local", tell=told.append)
    assert len([line for line in told if "limits.min_free_disk_mb" in line]) == 1
    assert not folder_of(spare).exists()


def test_with_no_room_allowed_nothing_is_kept(clinic: Clinic):
    none = dataclasses.replace(clinic, checkpoints=CheckpointSettings(max_mb=0))
    train(none, "local")
    assert not folder_of(none).exists()


# How many


def kept_during(clinic: Clinic, settings: CheckpointSettings) -> Sequence[list[str]]:
    """Return what is in the folder after each step."""
    clinic = dataclasses.replace(clinic, checkpoints=settings)
    seen: list[list[str]] = []
    train(clinic, observe=lambda _done: seen.append(files_of(clinic)))
    return seen


def test_the_newest_are_kept(clinic: Clinic):
    seen = kept_during(clinic, CheckpointSettings(every_s=0.0, keep=3))
    assert [len(names) for names in seen] == [2, 3, 3, 3, 3]
    assert seen[-1] == [f"training-{step:08}.checkpoint" for step in (3, 4, 5)]


def test_no_more_bytes_are_kept_than_allowed(clinic: Clinic, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fedpeft_client.vault.Vault.size", lambda _vault, _name: 400 << 10)
    seen = kept_during(clinic, CheckpointSettings(every_s=0.0, keep=9, max_mb=1))
    assert [len(names) for names in seen] == [2, 2, 2, 2, 2]


def test_between_two_there_is_the_time_that_was_set(clinic: Clinic):
    seen = kept_during(clinic, CheckpointSettings(every_s=3600.0))
    assert seen == [["training-00000000.checkpoint"]] * STEPS


def test_training_is_not_slowed_by_more_than_two_percent(
    clinic: Clinic, monkeypatch: pytest.MonkeyPatch
):
    """A checkpoint that took a second is followed by 49 seconds of training."""
    monkeypatch.setattr("fedpeft_client.rounds.checkpoints._REST", 49.0)
    clock = [0.0]
    monkeypatch.setattr("fedpeft_client.rounds.checkpoints.time.monotonic", lambda: clock[0])
    written: list[float] = []

    def slow(_vault: Any, _name: str, _data: bytes) -> None:
        written.append(clock[0])
        clock[0] += 1.0

    monkeypatch.setattr("fedpeft_client.vault.Vault.write", slow)
    clinic = dataclasses.replace(clinic, checkpoints=CheckpointSettings(every_s=0.0))
    steps = job_for(clinic, None).training.model_copy(update={"local_steps": 120})

    def minute(_done: StepDone) -> None:
        clock[0] += 1.0

    train(clinic, observe=minute, training=steps)
    assert written[:3] == [0.0, 1.0, 51.0]


# docs/spec/checkpoint.md


def test_the_documented_vector_is_what_the_code_writes(tmp_path: Path):
    text = (Path(__file__).parents[2] / "docs/spec/checkpoint.md").read_text("utf-8")
    vector = bytes.fromhex("".join(re.findall(r"^    ([0-9a-f]{20,})$", text, re.MULTILINE)))
    identity = Identity(bytes(range(128)))
    vault = Vault(tmp_path, identity)
    content = b"a finished round"
    key, nonce = vault_module._key_of(identity), bytes(range(12))
    assert vault_module._locked(key, "answer.checkpoint", nonce, content) == vector
    (tmp_path / "answer.checkpoint").write_bytes(vector)
    assert vault.read("answer.checkpoint") == content


def test_the_documented_tensors_and_keys_are_those_of_a_checkpoint(clinic: Clinic):
    stopped(clinic, "local", 2)
    vault = Vault(folder_of(clinic), clinic.membership.identity)
    entry = vault.read("training-00000002.checkpoint")
    length = int.from_bytes(entry[:8])
    about, data = json.loads(entry[8 : 8 + length]), entry[8 + length :]
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    said = json.loads(header.pop("__metadata__")["checkpoint"])
    text = (Path(__file__).parents[2] / "docs/spec/checkpoint.md").read_text("utf-8")
    documented = set(re.findall(r"`([a-z_.]+)`", text))
    states = {name.removeprefix("optimizer.") for name in header if "optimizer." in name}
    assert states <= documented
    assert {name for name in header if "optimizer." not in name} <= documented
    assert {*about, *said, *said["totals"], *said["keys"]} <= documented
