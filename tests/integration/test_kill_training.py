"""A clinic's process is killed (SIGKILL) at random moments of a round, and started again.

Each process is forked from this one, which has the libraries loaded already, and has an
identity, records, ledger and checkpoints on the disk, as a box has.
"""

import json
import os
import random
import shutil
import signal
import sqlite3
import time
import traceback
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from flwr.app import Context, Message

from fedpeft.config import AdapterSettings, PrivacySettings, Quantization, TrainingSettings
from fedpeft.models import Workbench, adapter_schema, fingerprint, initial_state
from fedpeft.privacy.ledger import Ledger
from fedpeft.protocol import Job, SumTerms
from fedpeft.protocol.parcel import Held
from fedpeft.sealing import Identity
from fedpeft.storage import write_atomically
from fedpeft.training import Observer, StepDone
from fedpeft_client.rounds.checkpoints import ANSWER
from fedpeft_client.rounds.clinic import Clinic, Membership
from fedpeft_client.rounds.work import Assignment, ClinicWork
from fedpeft_client.settings import CheckpointSettings, DataSettings, LimitSettings
from tests.integration.federations import Boxes, Listener, federation

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
LORA = AdapterSettings(rank=2, alpha=4.0, dropout=0.1)
STEPS = 30
TRAINING = TrainingSettings(
    learning_rate=5e-3,
    batch_size=4,
    micro_batch_size=2,
    local_steps=STEPS,
    max_length=64,
    schedule="cosine",
    warmup_steps=5,
)
SUM = SumTerms(confidentiality="secagg", adversary="active", bits=16, limit=1.0)
LOCAL = PrivacySettings(unit="patient", noise_multiplier=0.8)
_LONGEST_S = 120.0


@dataclass(frozen=True)
class Box:
    """A clinic's files, and the round that it is asked for."""

    clinic: Clinic
    job: Job

    @property
    def folder(self) -> Path:
        return self.clinic.ledger.parent

    def copied(self, place: Path) -> "Box":
        """Return a box with a copy of these files, the keys of the noise included."""
        shutil.copytree(self.folder, place)
        clinic = replace(
            self.clinic, ledger=place / "ledger.sqlite", checkpoint_directory=place / "checkpoints"
        )
        return Box(clinic, self.job)

    def charged(self) -> list[int]:
        with Ledger(self.clinic.ledger) as ledger:
            assert ledger.verify() == []
        with sqlite3.connect(self.clinic.ledger) as database:
            query = "SELECT step FROM entries WHERE kind = 'charge' ORDER BY seq"
            return [step for (step,) in database.execute(query)]


def box_of(model: Path, folder: Path, privacy: PrivacySettings | None, base: Quantization) -> Box:
    folder.mkdir()
    file = folder / "train.jsonl"
    rows = [
        {"question": f"north {at}?", "answer": f"It is {at * at}.", "patient_id": f"p{at // 2}"}
        for at in range(24)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    identity = Identity.generate()
    clinic = Clinic(
        name="north",
        federation="sea",
        membership=Membership(identity, identity.public),
        model=model,
        data=DataSettings(train=file),
        ledger=folder / "ledger.sqlite",
        dtype="float32",
        limits=LimitSettings(min_free_disk_mb=0),
        checkpoint_directory=folder / "checkpoints",
        checkpoints=CheckpointSettings(every_s=0.0),
    )
    job = Job(
        run="0" * 32,
        federation="sea",
        fingerprint=fingerprint(model),
        quantization=base,
        adapter=LORA,
        training=TRAINING,
        aggregation=SUM,
        privacy=privacy,
        round=1,
        rounds=2,
    )
    return Box(clinic, job)


def started(box: Box, observe: Observer | None = None) -> int:
    """Start a process that trains the round and writes what would leave; return its id."""
    if child := os.fork():
        return child
    try:
        torch.set_num_threads(1)  # the threads of the parent are not in its fork
        state = initial_state(adapter_schema(box.clinic.model, LORA), 0)
        assignment = Assignment(box.job, Held(state), state.schema.hash, 1)
        trained = ClinicWork(observe).train(box.clinic, assignment)
        write_atomically(box.folder / "sent", trained.to_bytes())
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def ended(child: int, kill_after_s: float | None = None) -> bool:
    """Wait for a process; return whether it was killed before it was done."""
    began = time.monotonic()
    while not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        lasted = time.monotonic() - began
        if lasted > (_LONGEST_S if kill_after_s is None else kill_after_s):
            os.kill(child, signal.SIGKILL)
        time.sleep(0.002)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


def sent(box: Box) -> bytes:
    """Let a round be finished, and return what leaves."""
    assert not ended(started(box))
    return (box.folder / "sent").read_bytes()


def kill_itself(done: StepDone) -> None:
    if done.step == 1:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a quarter of the time go into checkpoints, so that kills meet their writing too."""
    monkeypatch.setattr("fedpeft_client.rounds.checkpoints._REST", 3.0)


@pytest.mark.parametrize(
    ("kills", "privacy", "base"),
    [(8, None, "none"), (8, LOCAL, "none"), (4, None, "nf4")],
    ids=["plain", "private", "nf4"],
)
def test_a_round_that_is_killed_at_random_leaves_the_same_bytes_and_is_charged_once(
    tiny_model: Path,
    tmp_path: Path,
    kills: int,
    privacy: PrivacySettings | None,
    base: Quantization,
):
    # Loads what every process would have to load by itself.
    Workbench().adapted(tiny_model, LORA, quantization=base, dtype="float32")
    begun = box_of(tiny_model, tmp_path / "begun", privacy, base)
    assert ended(started(begun, kill_itself))
    undisturbed = begun.copied(tmp_path / "undisturbed")
    began = time.monotonic()
    expected = sent(undisturbed)
    lasts_s = time.monotonic() - began
    steps = [1] if privacy is None else list(range(1, STEPS + 1))
    assert undisturbed.charged() == steps

    chance = random.Random(6)
    boxes = [begun.copied(tmp_path / "box0")]
    while kills:
        if ended(started(boxes[-1]), chance.uniform(0.0, lasts_s)):
            kills -= 1
        else:
            boxes.append(begun.copied(tmp_path / f"box{len(boxes)}"))
    for box in boxes:
        assert sent(box) == expected
        assert box.charged() == steps
        assert [path.name for path in (box.folder / "checkpoints").iterdir()] == [ANSWER]


class PowerCut(Boxes):
    """All boxes are started anew when the first of them is to mask its update."""

    happened = False

    def _answer(self, message: Message, context: Context) -> Message:
        if message.metadata.message_type == "train.masked" and not self.happened:
            self.happened = True
            self.kept = [kept_by(clinic) for clinic in self.clinics]
            for clinic in self.clinics:
                self.restart(clinic.name)
        return super()._answer(message, context)


def kept_by(clinic: Clinic) -> list[str]:
    folder = clinic.checkpoint_directory
    assert folder is not None
    return [path.name for path in folder.iterdir()]


@pytest.mark.usefixtures("flower_identity")
def test_after_a_power_cut_in_a_secure_sum_the_next_one_opens_and_nothing_is_charged_twice(
    tiny_model: Path, tmp_path: Path
):
    plan = federation(
        tmp_path / "f",
        tiny_model,
        "fedavg",
        mode="secagg",
        clinics=4,
        training={"local_steps": 1, "optimizer": "sgd", "learning_rate": 0.1},
        rounds={"count": 1},
        privacy={
            "unit": "patient",
            "noise_multiplier": 1.0,
            "mechanism": "distributed",
            "honest_clinics": 3,
        },
    )
    folder = tmp_path / "checkpoints"
    boxes = PowerCut(plan, lambda each: replace(each, checkpoint_directory=folder / each.name))
    listener = Listener()
    boxes.run(listener)
    assert boxes.happened
    names = [clinic.name for clinic in boxes.clinics]
    # Of what they held in memory, the adapter is missing too, and is sent whole.
    reasons = ("out-of-order", "adapter-not-held")
    assert sorted(boxes.refusals) == sorted((name, why) for name in names for why in reasons)
    assert boxes.kept == [[ANSWER]] * 4
    assert [kept_by(clinic) for clinic in boxes.clinics] == [[]] * 4
    assert [record.round for record in listener.records] == [0, 1]
    for clinic in boxes.clinics:
        with Ledger(clinic.ledger) as ledger:
            (found,) = ledger.datasets()
            assert sum(ledger.charges(found.id).values()) == 1
