"""Whether an adapter that arrives is used here: the rule, and what it rests on."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from fedpeft.adapters import AdapterState, load_adapter, to_bytes
from fedpeft.config import AdapterSettings, PrivacySettings, TrainingSettings
from fedpeft.data import read_records
from fedpeft.evaluation import score
from fedpeft.models import AdaptedModel, adapter_schema, fingerprint, initial_state
from fedpeft.protocol import Job, RankTerms, SumTerms
from fedpeft.protocol.parcel import Held, Increment
from fedpeft.sealing import Identity
from fedpeft_client import general
from fedpeft_client.rounds.clinic import Clinic, Membership
from fedpeft_client.rounds.work import Assignment, ClinicWork
from fedpeft_client.settings import (
    AcceptanceSettings,
    BudgetSettings,
    DataSettings,
    LimitSettings,
)
from fedpeft_client.versions import examination
from fedpeft_client.versions.acceptance import Losses, judge
from fedpeft_client.versions.store import AdapterStore

RULE = AcceptanceSettings(max_forgetting=0.1)
LORA = AdapterSettings(rank=4, alpha=8.0)
LOCAL = PrivacySettings(unit="record", noise_multiplier=0.8)
SECRET = "Zebra"


def judged(rule: AcceptanceSettings = RULE, **changes: Any):
    losses: dict[str, Any] = {
        "new": Losses(own=1.0, general=2.0),
        "in_use": Losses(own=1.2, general=2.0),
        "base": Losses(own=2.0, general=2.0),
        "vocabulary": 1000,
    }
    return judge(rule, rival="round-1", **(losses | changes))


# The rule


@pytest.mark.parametrize("loss", [math.inf, math.nan, -math.inf])
def test_a_loss_that_is_no_number_is_refused(loss: float):
    for new in (Losses(own=loss, general=2.0), Losses(own=1.0, general=loss)):
        found = judged(new=new)
        assert not found.accepted
        assert found.reason == "its loss here is not a finite number"


def test_a_higher_loss_is_refused_and_the_reason_has_the_figures():
    found = judged(new=Losses(own=1.26, general=2.0))
    assert not found.accepted
    assert found.reason == (
        "its loss on this clinic's validation rows is 1.2600, 5.00 % above the 1.2000 of round-1, "
        "and acceptance.min_improvement = 0 in client.toml"
    )


def test_forgetting_is_refused_however_good_the_rest_is():
    found = judged(new=Losses(own=0.1, general=2.21))
    assert not found.accepted
    assert found.reason == (
        "it forgets general language: the loss there is 2.2100, 10.5 % above the base model's "
        "2.0000, and acceptance.max_forgetting = 0.1 in client.toml"
    )
    assert judged(new=Losses(own=0.1, general=2.19)).accepted


def test_forgetting_counts_from_the_base_model_and_not_from_what_is_in_use():
    """Else each round could forget a little more than the one before."""
    in_use = Losses(own=1.2, general=2.19)
    assert not judged(new=Losses(own=1.0, general=2.3), in_use=in_use).accepted


def test_without_a_demand_what_is_not_worse_is_taken():
    assert judged(new=Losses(own=1.2, general=2.0)).accepted
    assert "the same as the 1.2000 of round-1" in judged(new=Losses(own=1.2, general=2.0)).reason
    assert not judged(new=Losses(own=1.2000001, general=2.0)).accepted


@pytest.mark.parametrize(("own", "taken"), [(1.13, True), (1.15, False), (1.2, False)])
def test_a_demand_for_improvement_is_relative_to_what_is_in_use(own: float, taken: bool):
    rule = AcceptanceSettings(min_improvement=0.05)
    assert judged(rule, new=Losses(own=own, general=2.0)).accepted == taken


def test_a_loss_of_nothing_cannot_be_improved():
    zero = Losses(own=0.0, general=2.0)
    assert judged(in_use=zero, new=zero).accepted
    assert not judged(in_use=zero, new=Losses(own=1e-9, general=2.0)).accepted


def test_without_own_rows_it_is_said_plainly_and_forgetting_still_counts():
    none = Losses(own=None, general=2.0)
    found = judged(new=none, in_use=none, base=none)
    assert found.accepted
    assert found.reason.startswith("unmeasured on records of this clinic")
    assert "data.valid" in found.reason
    worse = Losses(own=None, general=2.3)
    assert not judged(new=worse, in_use=none, base=none).accepted


def test_a_base_model_that_only_guesses_is_told_whatever_the_verdict():
    base = Losses(own=6.8, general=6.9)  # guessing among 1000 tokens: 6.91
    taken = judged(base=base)
    refused = judged(base=base, new=Losses(own=1.3, general=2.0))
    assert taken.accepted
    assert not refused.accepted
    for found in (taken, refused):
        assert "hardly better than guessing on this clinic's validation rows" in found.reason
        assert "6.80 and that of guessing among 1000 tokens 6.91" in found.reason
    general = judged(base=Losses(own=5.0, general=6.9))
    assert "guessing on general text" in general.reason
    assert "guessing" not in judged(base=Losses(own=5.0, general=5.0)).reason
    assert "guessing" in judged(base=Losses(own=5.0, general=5.0), vocabulary=150).reason


@pytest.mark.parametrize("loss", [math.inf, math.nan])
def test_a_base_model_that_computes_no_numbers_is_told_and_nothing_is_taken(loss: float):
    found = judged(base=Losses(own=2.0, general=loss))
    assert not found.accepted
    assert "the base model's own loss on general text is no finite number" in found.reason
    both = judged(base=Losses(own=loss, general=loss), new=Losses(own=loss, general=loss))
    assert not both.accepted
    assert "base model's own loss on this clinic's validation rows" in both.reason
    assert "model.directory" in both.reason


# The general rows


def test_the_general_rows_are_plain_varied_english_without_medicine():
    folder = Path(general.__file__).parent
    files = [folder / "questions.jsonl", folder / "prose.jsonl"]
    records = [record for file in files for record in read_records(file).records]
    texts = [" ".join(turn.text for turn in record.turns) or str(record.text) for record in records]
    assert len(set(texts)) == len(texts) == 60
    assert all(20 < len(text) < 400 for text in texts)
    words = set(" ".join(texts).lower().replace(",", " ").replace(".", " ").split())
    assert len(words) > 600
    assert not words & {"patient", "doctor", "disease", "medicine", "hospital", "tablet", "pain"}


# At the box


@pytest.fixture
def clinic(tiny_model: Path, tmp_path: Path) -> Clinic:
    rows = tmp_path / "rows.jsonl"
    lines = [{"question": f"{SECRET} {at}?", "answer": f"{SECRET} {at * at}."} for at in range(8)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    identity = Identity.generate()
    return Clinic(
        name="north",
        federation="sea",
        membership=Membership(identity, identity.public),
        model=tiny_model,
        data=DataSettings(train=rows, valid=rows),
        ledger=tmp_path / "ledger.sqlite",
        dtype="float32",
        limits=LimitSettings(min_free_disk_mb=0),
        acceptance=AcceptanceSettings(max_forgetting=0.5, report_verdict=True),
        store_directory=tmp_path / "box" / "adapters",
    )


def job_for(clinic: Clinic, number: int, **changes: Any) -> Job:
    fields: dict[str, Any] = {
        "federation": "sea",
        "run": "1" * 32,
        "fingerprint": fingerprint(clinic.model),
        "quantization": "none",
        "adapter": LORA,
        "training": TrainingSettings(
            learning_rate=2e-2, batch_size=4, local_steps=12, max_length=64
        ),
        "aggregation": SumTerms(confidentiality="secagg", adversary="active", bits=16, limit=1.0),
        "asks_verdict": True,
        "round": number,
        "rounds": 9,
    }
    return Job(**(fields | changes))


def bad(clinic: Clinic, seed: int = 3) -> AdapterState:
    """An adapter that makes everything worse."""
    schema = adapter_schema(clinic.model, LORA)
    values = torch.randn(schema.numel, generator=torch.Generator().manual_seed(seed))
    return AdapterState(schema, values)


class Box:
    """A clinic that is sent adapters, with what it said and measured."""

    def __init__(self, clinic: Clinic) -> None:
        self.clinic = clinic
        self.said: list[str] = []
        self.work = ClinicWork(tell=self.said.append)
        assert clinic.store_directory is not None
        self.store = AdapterStore(clinic.store_directory, clinic.adapters)

    def send(self, number: int, state: AdapterState, **changes: Any):
        job = job_for(self.clinic, number, **changes)
        return self.work.evaluate(self.clinic, Assignment(job, Held(state), state.schema.hash, 1))

    def trained(self, number: int, state: AdapterState) -> AdapterState:
        """Return the adapter after this clinic alone has trained it in round ``number``."""
        job = job_for(self.clinic, number)
        assignment = Assignment(job, Held(state), state.schema.hash, 1)
        update = self.work.train(self.clinic, assignment).update
        return AdapterState(state.schema, state.values + update.values)


@pytest.fixture
def box(clinic: Clinic) -> Box:
    return Box(clinic)


def start(clinic: Clinic) -> AdapterState:
    return initial_state(adapter_schema(clinic.model, LORA), 0)


def test_an_adapter_that_is_worse_is_kept_and_not_used(box: Box, clinic: Clinic):
    measured = box.send(1, bad(clinic))
    assert measured.tokens > 0
    assert measured.accepted is False
    assert box.store.in_use() is None
    version = box.store.find("round-1")
    assert torch.equal(load_adapter(version.path, bad(clinic).schema).values, bad(clinic).values)
    assert box.said[-1].startswith(
        "north: the adapter round-1 was not taken into use, base stays: "
    )
    assert version.verdict.reason in box.said[-1]


def test_a_better_adapter_is_taken_and_a_worse_one_after_it_is_not(box: Box, clinic: Clinic):
    good = box.trained(1, start(clinic))
    assert box.send(1, good).accepted is True
    assert box.store.find().name == "round-1"
    assert box.send(2, bad(clinic)).accepted is False
    assert box.store.find().name == "round-1"
    better = box.trained(3, good)
    assert box.send(3, better).accepted is True
    assert box.store.find().name == "round-3"
    found = box.store.find("round-2").verdict
    assert found.rival == "round-1"
    assert found.in_use == box.store.find("round-1").verdict.new


def test_training_goes_on_with_the_servers_adapter_whatever_the_verdict(clinic: Clinic):
    one, other = Box(clinic), Box(clinic)
    one.send(1, bad(clinic))
    assert torch.equal(one.trained(2, bad(clinic)).values, other.trained(2, bad(clinic)).values)


def test_the_losses_are_those_of_each_adapter_on_each_set(
    box: Box, clinic: Clinic, make_model: Any
):
    good = box.trained(1, start(clinic))
    box.send(1, good)
    box.send(2, bad(clinic))
    found = box.store.find("round-2").verdict
    model: AdaptedModel = make_model(LORA)
    rows = box.work._records.valid(clinic, model.base, 64)
    texts = box.work._admission._examiner.general(model.base)
    zero = AdapterState(model.schema, torch.zeros(model.schema.numel))
    for losses, state in ((found.new, bad(clinic)), (found.in_use, good), (found.base, zero)):
        model.load(state)
        assert losses is not None
        assert losses.own == pytest.approx(score(model, rows).loss, rel=1e-6)
        assert losses.general == pytest.approx(score(model, texts).loss, rel=1e-6)


def test_what_was_measured_is_not_measured_again(
    box: Box, clinic: Clinic, monkeypatch: pytest.MonkeyPatch
):
    counted: list[int] = []

    def counting(model: AdaptedModel, examples: Any) -> Any:
        counted.append(len(examples))
        return score(model, examples)

    monkeypatch.setattr(examination, "score", counting)
    good = box.trained(1, start(clinic))
    box.send(1, good)
    assert counted == [60, 8, 60]  # the new one in general; the base on both
    for number in (2, 3):
        counted.clear()
        box.send(number, bad(clinic, number))
        assert counted == [60]
    counted.clear()
    again = Box(clinic)
    again.send(4, bad(clinic, 4))
    assert counted == [60]
    rows = clinic.data.train.read_text("utf-8")
    clinic.data.train.write_text(rows + rows, "utf-8")
    counted.clear()
    again.send(5, bad(clinic, 5))
    assert counted == [60, 16, 16]  # other rows: base and the one in use anew


def test_without_validation_rows_it_is_taken_unmeasured_and_said(clinic: Clinic):
    box = Box(dataclasses.replace(clinic, data=DataSettings(train=clinic.data.train)))
    measured = box.send(1, start(clinic))
    assert (measured.tokens, measured.accepted) == (0, True)
    assert "unmeasured on records of this clinic" in box.said[-1]
    assert box.store.find().verdict.new is not None


@pytest.mark.parametrize(("asked", "allowed"), [(False, False), (True, False), (False, True)])
def test_the_verdict_is_told_only_if_both_sides_want_it(asked: bool, allowed: bool, clinic: Clinic):
    rule = AcceptanceSettings(max_forgetting=0.5, report_verdict=allowed)
    box = Box(dataclasses.replace(clinic, acceptance=rule))
    assert box.send(1, bad(clinic), asks_verdict=asked).accepted is None
    assert not box.store.find("round-1").verdict.accepted


def test_under_noise_the_box_judges_and_tells_the_server_nothing(box: Box, clinic: Clinic):
    good = box.trained(1, start(clinic))
    measured = box.send(1, good, privacy=LOCAL)
    assert (measured.nll, measured.tokens, measured.accepted) == (0, 0, None)
    found = box.store.find().verdict
    assert found.new is not None
    assert found.new.own is not None
    assert box.send(2, bad(clinic), privacy=LOCAL).accepted is None
    assert box.store.find().name == "round-1"


def test_under_noise_that_leaves_losses_exact_the_verdict_may_be_told(clinic: Clinic):
    allowed = BudgetSettings(exact_losses=True)
    box = Box(dataclasses.replace(clinic, privacy=allowed))
    exact = LOCAL.model_copy(update={"exact_losses": True})
    assert box.send(1, bad(clinic), privacy=exact).accepted is False


def test_a_damaged_adapter_in_use_does_not_stop_the_next_one(box: Box, clinic: Clinic):
    good = box.trained(1, start(clinic))
    box.send(1, good)
    (box.store.find().path / "adapter_model.safetensors").write_bytes(b"x")
    box.send(2, good)
    assert box.store.find().name == "round-2"
    assert any("round-1 is damaged" in line for line in box.said)
    assert "of base" in box.store.find().verdict.reason


def test_an_adapter_of_another_rank_is_compared_too(box: Box, clinic: Clinic):
    box.send(1, box.trained(1, start(clinic)))
    terms = RankTerms(rule="truncated", of={"north": 2}, others=4)
    box.send(2, bad(clinic), ranks=terms)
    assert box.store.find().name == "round-1"
    assert box.store.find("round-2").verdict.rival == "round-1"


def test_on_a_changed_base_the_base_model_is_measured_as_its_files_are(box: Box, clinic: Clinic):
    box.send(1, bad(clinic))
    before = box.store.find("round-1").verdict.base
    schema = adapter_schema(clinic.model, LORA).of_rank(2)
    values = torch.randn(schema.numel, generator=torch.Generator().manual_seed(9)) * 0.3
    product = Increment(2, to_bytes(AdapterState(schema, values), "update"))
    job = job_for(clinic, 2, base_change=(product.digest,))
    good = start(clinic)
    work = ClinicWork()
    for _ in range(2):  # the second time the base model has to be loaded for the new one again
        (box.store.directory / "measured.json").unlink()
        measured = work.evaluate(
            clinic, Assignment(job, Held(good, (product,)), good.schema.hash, 1)
        )
        found = box.store.find("round-2").verdict
        assert found.base is not None
        assert before is not None
        assert found.base.own == pytest.approx(before.own, rel=1e-6)
        assert found.new is not None
        assert found.new.own == pytest.approx(measured.nll / measured.tokens)
        assert found.new.own != pytest.approx(before.own, rel=1e-3)


def test_the_start_of_a_run_is_neither_judged_nor_kept(box: Box, clinic: Clinic):
    assert box.send(0, start(clinic)).accepted is None
    assert box.store.versions() == []


def test_no_text_of_a_record_is_in_what_is_said_or_written(box: Box, clinic: Clinic):
    box.send(1, box.trained(1, start(clinic)))
    box.send(2, bad(clinic))
    assert clinic.store_directory is not None
    files = [path for path in clinic.store_directory.rglob("*") if path.is_file()]
    assert len(files) > 8
    for path in files:
        assert SECRET.encode() not in path.read_bytes()
    assert SECRET not in "".join(box.said)
    assert SECRET in clinic.data.train.read_text("utf-8")
