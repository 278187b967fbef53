"""Proof by attack: the audit finds what an overfitted adapter gives away, and keeps it back."""

import random
from pathlib import Path

import pytest

from fedpeft.adapters import save_adapter
from fedpeft.audit import (
    Attack,
    AuditReport,
    Planting,
    plant,
    require_release,
    run_audit,
)
from fedpeft.config import AdapterSettings, ModelSettings, ReleaseSettings, TrainingSettings
from fedpeft.data import encode, read_records
from fedpeft.demo.clinics import write_federation
from fedpeft.errors import ReleaseRefused
from fedpeft.models import Workbench, initial_state, resolve_base
from fedpeft.training import Place, train

MODEL = ModelSettings(base="embedded", dtype="float32")
LORA = AdapterSettings(rank=16, alpha=32.0)
STEPS = TrainingSettings(learning_rate=5e-3, batch_size=16, local_steps=100, schedule="cosine")


@pytest.fixture(scope="module")
def overfitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[AuditReport, Path]:
    """The audit of an adapter that saw a few records of one clinic again and again."""
    place = tmp_path_factory.mktemp("audit")
    lines = write_federation(place)[0].train.read_text().splitlines()[:60]
    (place / "few.jsonl").write_text("\n".join(lines))
    planting = Planting(canaries=8, share=1.0)
    key, data = place / "key.json", place / "planted.jsonl"
    plant(place / "few.jsonl", data, key, planting, draw=random.Random(4))
    base = resolve_base("embedded", relative_to=Path())
    model = Workbench().adapted(base, LORA, quantization="none", dtype="float32")
    model.load(initial_state(model.schema, 0))
    examples = encode(read_records(data), model.base.tokenizer, max_length=96).examples
    train(model, examples, STEPS, Place("north", 1, 1))
    save_adapter(model.read(), LORA, place / "adapter", base_name="embedded")
    attack = Attack(model=MODEL, adapter=place / "adapter", keys=(key,), samples=31)
    return run_audit(attack, lambda _: None), place / "adapter"


def test_records_are_recognised(overfitted: tuple[AuditReport, Path]):
    report, _ = overfitted
    assert report.membership is not None
    assert report.membership.auc >= 0.75
    assert report.membership.member_loss < report.membership.nonmember_loss


def test_secrets_with_many_copies_are_extracted_and_others_never(
    overfitted: tuple[AuditReport, Path],
):
    report, _ = overfitted
    most = report.canaries.by_repetition[-1]
    assert (most.repetitions, most.extracted) == (16, len(most.included))
    assert most.extracted > 0
    assert min(most.included) == pytest.approx(report.canaries.bits)
    assert max(most.left_out) < 15


def test_the_bound_on_epsilon_refutes_strong_privacy(overfitted: tuple[AuditReport, Path]):
    bounds = {each.unit: each.bound for each in overfitted[0].epsilon}
    assert bounds["patient"].lower > 0.5
    assert bounds["patient"].canaries == 24


def test_the_adapter_is_kept_back(overfitted: tuple[AuditReport, Path]):
    report, adapter = overfitted
    with pytest.raises(ReleaseRefused, match=r"AUC is .*exposure of 26\.6 bits"):
        require_release(report, ReleaseSettings(max_auc=0.6, max_exposure=10), adapter)
