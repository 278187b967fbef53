"""Whole audits of the tiny model: determinism, chance, and what is refused."""

import json
import random
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from fedpeft.adapters import save_adapter
from fedpeft.audit import (
    Attack,
    AuditReport,
    Planting,
    draw,
    judge,
    plant,
    release,
    require_release,
    run_audit,
)
from fedpeft.config import AdapterSettings, ModelSettings, ReleaseSettings
from fedpeft.errors import (
    AdapterError,
    ConfigError,
    DataError,
    FedpeftError,
    ReleaseRefused,
    StorageError,
)

LORA = AdapterSettings(rank=4, alpha=8.0)


class Tails(random.Random):
    """Every coin falls on tails; all else is as random as ever."""

    def random(self) -> float:
        return 0.9

    def getrandbits(self, k: int, /) -> int:
        return super().getrandbits(k)


def write_rows(path: Path, kind: str) -> Path:
    rows = [
        {"text": f"day {number} in the ward, pulse {number}"}
        if kind == "text"
        else {"question": f"pulse on day {number}?", "answer": f"{60 + number}"}
        for number in range(60)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def place(tmp_path: Path, make_model: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with records, a key for them, and an adapter that saw none of them."""
    monkeypatch.setattr("fedpeft.models.workbench.choose_dtype", lambda *_: torch.float32)
    save_adapter(make_model(LORA, noise=0.05).read(), LORA, tmp_path / "adapter", base_name="x")
    data = write_rows(tmp_path / "data.jsonl", "conversation")
    planting = Planting(canaries=6, share=1.0)
    plant(data, tmp_path / "out.jsonl", tmp_path / "key.json", planting, draw=random.Random(1))
    return tmp_path


def audit(place: Path, model: Path, **changes: Any) -> AuditReport:
    options: dict[str, Any] = {
        "model": ModelSettings(base=str(model)),
        "adapter": place / "adapter",
        "keys": (place / "key.json",),
        "samples": 31,
    }
    return run_audit(Attack(**{**options, **changes}), lambda _: None)


def test_an_adapter_that_saw_nothing_gives_nothing_away(place: Path, tiny_model: Path):
    found = audit(place, tiny_model)
    assert found.membership is not None
    for attack in (found.membership.loss, found.membership.calibrated):
        assert attack.interval[0] <= 0.5 <= attack.interval[1]
    assert found.canaries.extracted == 0
    assert found.canaries.exposure < 10
    assert [each.bound.lower for each in found.epsilon] == [0.0, 0.0]
    assert found.membership.members + found.membership.nonmembers == 60


def test_the_same_key_gives_the_same_figures(place: Path, tiny_model: Path):
    assert audit(place, tiny_model) == audit(place, tiny_model)


def test_plain_texts_are_judged_by_their_secrets_only(place: Path, tiny_model: Path):
    data = write_rows(place / "texts.jsonl", "text")
    plant(data, place / "o.jsonl", place / "text.json", Planting(canaries=4))
    found = audit(place, tiny_model, keys=(place / "text.json",))
    assert sum(len(e.included) + len(e.left_out) for e in found.canaries.by_repetition) == 12
    assert found.canaries.extracted == 0


def test_keys_of_several_clinics_are_taken_together(place: Path, tiny_model: Path):
    data = write_rows(place / "more.jsonl", "text")
    plant(data, place / "o.jsonl", place / "more.json", Planting(canaries=4, share=0.5))
    found = audit(place, tiny_model, keys=(place / "key.json", place / "more.json"))
    assert found.epsilon[0].bound.canaries == 18 + 12
    assert found.membership is not None
    assert found.membership.members + found.membership.nonmembers == 60 + 30


def test_another_reference_changes_the_calibrated_attack_only(place: Path, tiny_model: Path):
    base, own = audit(place, tiny_model), audit(place, tiny_model, reference=place / "adapter")
    assert base.membership is not None
    assert own.membership is not None
    assert own.membership.loss == base.membership.loss
    assert own.membership.calibrated.auc == 0.5
    assert own.canaries == base.canaries


def test_progress_ends_at_the_number_of_rows(place: Path, tiny_model: Path):
    seen: list[tuple[int, int]] = []
    attack = Attack(
        model=ModelSettings(base=str(tiny_model)),
        adapter=place / "adapter",
        keys=(place / "key.json",),
        samples=3,
    )
    run_audit(attack, lambda _: None, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (2 * (18 + 60) + 18 * 3,) * 2
    assert seen == sorted(seen)


def test_without_held_out_records_membership_is_not_measured(place: Path, tiny_model: Path):
    planting = Planting(canaries=4, share=0.0)
    plant(place / "data.jsonl", place / "o.jsonl", place / "none.json", planting)
    found = audit(place, tiny_model, keys=(place / "none.json",))
    assert found.membership is None
    assert found.as_json()["membership"] is None
    assert "not measured" in found.sentences()[0]
    ElementTree.fromstring(draw(found))


def test_the_report_names_no_secret_and_is_json(place: Path, tiny_model: Path):
    found = audit(place, tiny_model)
    text = json.dumps(found.as_json()) + draw(found) + "".join(found.sentences())
    key = json.loads((place / "key.json").read_text())
    assert not any(each["secret"] in text or each["prompt"] in text for each in key["canaries"])
    assert found.as_json()["schema"] == 1
    assert found.as_json()["epsilon"][0]["interval"] == [0.0, None]


def test_the_picture_is_valid_and_has_a_dot_for_each_canary(place: Path, tiny_model: Path):
    picture = ElementTree.fromstring(draw(audit(place, tiny_model)))
    assert len(picture.findall("{*}circle")) == 18
    assert len(picture.findall("{*}polyline")) == 3 + 2 * 3


# What is refused


def test_changed_data_is_refused(place: Path, tiny_model: Path):
    (place / "data.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    with pytest.raises(DataError, match="its content has changed"):
        audit(place, tiny_model)


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"keys": ("none.json",)}, DataError, "there is no audit key"),
        ({"keys": ("key.json", "key.json")}, DataError, "named twice"),
        ({"adapter": "none"}, AdapterError, "no adapter directory"),
        ({"max_length": 9}, ConfigError, "do not fit into 9 tokens"),
        ({"samples": 0}, ConfigError, "take 1 or more"),
        ({"keys": ()}, ConfigError, "--key"),
        ({"delta": 1.0}, ConfigError, "delta"),
    ],
)
def test_bad_input_is_told_in_one_sentence(
    place: Path, tiny_model: Path, changes: dict[str, Any], kind: type[FedpeftError], words: str
):
    if "keys" in changes:
        changes = {"keys": tuple(place / name for name in changes["keys"])}
    if "adapter" in changes:
        changes = {"adapter": place / changes["adapter"]}
    with pytest.raises(kind, match=words) as caught:
        audit(place, tiny_model, **changes)
    assert "\n" not in str(caught.value)


def test_the_adapter_of_another_model_is_refused(place: Path, tiny_model: Path):
    record = place / "adapter" / "fedpeft.json"
    content = json.loads(record.read_text())
    record.write_text(json.dumps({**content, "base_fingerprint": "0" * 64}))
    with pytest.raises(FedpeftError, match="base model"):
        audit(place, tiny_model)


# Release


def test_limits_that_are_kept_let_the_adapter_out(place: Path, tiny_model: Path):
    found = audit(place, tiny_model)
    limits = ReleaseSettings(max_auc=0.9, max_exposure=12.0)
    assert judge(found, limits) == []
    require_release(found, limits, place / "adapter")
    release(place / "adapter", place / "released" / "adapter")
    for path in (place / "adapter").iterdir():
        assert (place / "released" / "adapter" / path.name).read_bytes() == path.read_bytes()
    assert [path.name for path in (place / "released").iterdir()] == ["adapter"]


def test_limits_that_are_passed_are_all_named(place: Path, tiny_model: Path):
    found = audit(place, tiny_model)
    limits = ReleaseSettings(max_auc=0.5, max_exposure=0.1)
    with pytest.raises(ReleaseRefused, match=r"AUC .*max_auc = 0.5; .*max_exposure = 0.1"):
        require_release(found, limits, place / "adapter")
    assert len(judge(found, limits)) == 2


def test_what_was_not_measured_does_not_pass(place: Path, tiny_model: Path):
    planting = Planting(canaries=1, repetitions=(1,), share=0.0)
    key = place / "none.json"
    plant(place / "data.jsonl", place / "o.jsonl", key, planting, draw=Tails(1))
    found = audit(place, tiny_model, keys=(key,))
    limits = ReleaseSettings(max_auc=0.9, max_exposure=9)
    assert [reason.split()[0] for reason in judge(found, limits)] == ["max_auc", "max_exposure"]
    assert judge(found, ReleaseSettings()) == []


def test_a_released_adapter_is_not_written_over(place: Path):
    (place / "there").mkdir()
    with pytest.raises(StorageError, match="there exists"):
        release(place / "adapter", place / "there")
