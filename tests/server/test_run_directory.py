"""A run on disk: whatever breaks, the rounds that were finished are there, whole."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fedpeft.adapters import AdapterSchema, AdapterState, TensorSpec, load_adapter
from fedpeft.config import AdapterSettings, FederationSettings
from fedpeft.errors import AdapterError, StorageError
from fedpeft.protocol import RankTerms
from fedpeft_server.rounds.collection import ConfidentialityRecord
from fedpeft_server.rounds.outcome import Outcome
from fedpeft_server.rounds.privacy_record import PrivacyRecord
from fedpeft_server.runs.directory import FailedClinic, RoundRecord, RunDirectory

BASE = "a" * 64
SCHEMA = AdapterSchema(
    (
        TensorSpec("base_model.m.lora_A.weight", (2, 4)),
        TensorSpec("base_model.m.lora_B.weight", (3, 2)),
    ),
    BASE,
)
SETTINGS = FederationSettings.model_validate(
    {
        "name": "sea",
        "adapter": {"rank": 2},
        "rounds": {"count": 3},
        "strategy": {"name": "fedavg"},
    }
)


def altered(**changes: Any) -> FederationSettings:
    return FederationSettings.model_validate({**SETTINGS.model_dump(), **changes})


def run_in(path: Path, settings: FederationSettings = SETTINGS, engine: str = "flower"):
    return RunDirectory(path / "run", settings, engine=engine)


def state(number: int) -> AdapterState:
    return AdapterState(SCHEMA, torch.full((SCHEMA.numel,), float(number)))


def outcome(number: int) -> Outcome:
    return Outcome(adapter=state(number))


def record(number: int, **changes: Any) -> RoundRecord:
    content: dict[str, Any] = {
        "round": number,
        "participants": ("north", "south") if number else (),
        "failed": (),
        "train_loss": 3.0 - number if number else None,
        "valid_loss": 4.0 - number,
        "per_clinic": {"north": 4.5 - number, "south": 3.5 - number},
        "bytes_up": 10 * number,
        "bytes_down": 20 * number,
        "seconds": 1.5,
    }
    return RoundRecord.model_validate({**content, **changes})


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run with rounds 0 and 1 finished."""
    run = run_in(tmp_path)
    assert run.open(BASE) is None
    for number in (0, 1):
        run.save_round(record(number), outcome(number))
    return run


def assert_round_1_is_last(path: Path) -> None:
    again = run_in(path)
    assert again.open(BASE) == 1
    assert [each.round for each in again.records()] == [0, 1]
    assert torch.equal(again.outcome_of(1, SCHEMA).adapter.values, state(1).values)


# What breaks


@pytest.mark.parametrize("moment", ["temporary.mkdir", "adapter", "record", "rename"])
def test_a_crash_before_the_rename_leaves_the_rounds_before(
    moment: str, run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def crash(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    place = {
        "temporary.mkdir": (Path, "mkdir"),
        "adapter": (RunDirectory, "_save_adapter"),
        "record": (RoundRecord, "model_dump_json"),
        "rename": (Path, "rename"),
    }[moment]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(*place, crash)
        run.save_round(record(2), outcome(2))
    assert_round_1_is_last(tmp_path)
    run_in(tmp_path).save_round(record(2), outcome(2))
    assert run_in(tmp_path).open(BASE) == 2


def test_a_full_disk_is_explained_and_leaves_the_rounds_before(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(StorageError, match="no space left"):
        patch.setattr("fedpeft.storage.os.fsync", full)
        run.save_round(record(2), outcome(2))
    assert_round_1_is_last(tmp_path)


def test_a_crash_after_the_rename_is_made_good(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def crash(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RunDirectory, "publish", crash)
        run.save_round(record(2), outcome(2))
    again = run_in(tmp_path)
    assert again.open(BASE) == 2
    again.publish(again.outcome_of(2, SCHEMA))
    assert torch.equal(load_adapter(again.path / "adapter", SCHEMA).values, state(2).values)
    assert len(json.loads((again.path / "summary.json").read_text())["rounds"]) == 2


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", '{"round": 1}'])
def test_a_damaged_record_names_its_file(content: str, run: RunDirectory):
    (run.path / "rounds" / "1" / "round.json").write_text(content)
    with pytest.raises(StorageError, match=r"rounds/1/round\.json is damaged; remove"):
        run.records()


def test_removing_a_damaged_round_goes_on_from_the_one_before(run: RunDirectory, tmp_path: Path):
    shutil.rmtree(run.path / "rounds" / "1")
    assert run_in(tmp_path).open(BASE) == 0


def test_a_damaged_adapter_is_told(run: RunDirectory):
    weights = run.path / "rounds" / "1" / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(AdapterError, match="rounds/1"):
        run.outcome_of(1, SCHEMA)


def test_rounds_after_a_gap_do_not_count(run: RunDirectory, tmp_path: Path):
    shutil.copytree(run.path / "rounds" / "1", run.path / "rounds" / "3")
    assert run_in(tmp_path).open(BASE) == 1


@pytest.mark.parametrize(
    "settings",
    [
        altered(name="lake"),
        altered(adapter={"rank": 4}),
        altered(training={"learning_rate": 1.0}),
        altered(rounds={"count": 4}),
        altered(strategy={"name": "other"}),
        altered(clinic=[{"name": "north", "train": "x"}]),
    ],
    ids=["name", "adapter", "training", "rounds", "strategy", "clinics"],
)
def test_a_run_with_other_settings_is_refused(
    settings: FederationSettings, run: RunDirectory, tmp_path: Path
):
    with pytest.raises(StorageError, match="holds a run with other settings"):
        run_in(tmp_path, settings).open(BASE)
    assert_round_1_is_last(tmp_path)


def test_a_run_on_another_base_model_or_engine_is_refused(run: RunDirectory, tmp_path: Path):
    with pytest.raises(StorageError):
        run_in(tmp_path).open("b" * 64)
    with pytest.raises(StorageError):
        run_in(tmp_path, engine="local").open(BASE)


@pytest.mark.parametrize("content", ["", "{", "[1"])
def test_a_damaged_identity_is_told(content: str, run: RunDirectory, tmp_path: Path):
    (run.path / "run.json").write_text(content)
    with pytest.raises(StorageError, match=r"run\.json cannot be read"):
        run_in(tmp_path).open(BASE)


def test_a_directory_with_something_else_in_it_is_not_used(tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("x")
    with pytest.raises(StorageError, match="not empty and holds no run"):
        run_in(tmp_path).open(BASE)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_a_file_in_the_place_of_the_directory_is_told(tmp_path: Path):
    (tmp_path / "run").write_text("x")
    with pytest.raises(StorageError, match="run"):
        run_in(tmp_path).open(BASE)


# What is kept


def test_waiting_and_retries_may_change_when_a_run_goes_on(run: RunDirectory, tmp_path: Path):
    rounds = {"count": 3, "timeout_s": 5.0, "retries": 9, "minimum_clinics": 4}
    assert run_in(tmp_path, altered(rounds=rounds)).open(BASE) == 1


@pytest.mark.parametrize("beside", [["data"], ["data", "logs", "compared", "ledgers"], []])
def test_what_simulations_put_beside_a_run_is_no_obstacle(beside: list[str], tmp_path: Path):
    for name in beside:
        (tmp_path / "run" / name).mkdir(parents=True)
    assert run_in(tmp_path).open(BASE) is None


def test_every_round_keeps_its_adapter(run: RunDirectory):
    for number in (0, 1):
        assert torch.equal(run.outcome_of(number, SCHEMA).adapter.values, state(number).values)
    assert torch.equal(load_adapter(run.path / "adapter", SCHEMA).values, state(1).values)


def test_records_come_back_as_they_were(run: RunDirectory):
    failed = (FailedClinic(clinic="west", reason="not-finite"),)
    last = record(2, failed=failed, valid_loss=None, per_clinic={}, ranks=RANKS)
    run.save_round(last, outcome(2))
    assert run.records() == [record(0), record(1), last]


RANKS = RankTerms(rule="nested", of={"north": 2, "south": 1}, others=1, alike=True)
SECAGG: dict[str, Any] = {
    "mode": "secagg",
    "threshold": 3,
    "survivors": 4,
    "bits": 16,
    "wire_bytes_per_coordinate": 2.25,
    "limit": 8.0,
    "clipped": 0,
    "next_limit": 4.0,
}


def test_the_summary_has_exactly_the_agreed_schema(run: RunDirectory):
    failed = (FailedClinic(clinic="west", reason="not-finite"),)
    seen = ConfidentialityRecord(**SECAGG)
    last = record(
        2,
        failed=failed,
        per_clinic={"north": 2.5},
        confidentiality=seen,
        sent="AB",
        product_error=0.25,
        ranks=RANKS,
        max_ranks={"north": 8},
        verdicts=2,
        accepted=1,
    )
    run.save_round(last, outcome(2))
    summary = json.loads((run.path / "summary.json").read_text())
    peak = summary.pop("peak_rss_mb")
    assert isinstance(peak, float)
    assert 10 < peak < 1e6
    assert summary == {
        "schema": 1,
        "federation": "sea",
        "engine": "flower",
        "strategy": "fedavg",
        "model": {"base": "embedded", "fingerprint": BASE, "quantization": "none"},
        "rounds": [
            {
                "round": number,
                "participants": ["north", "south"],
                "failed": [{"clinic": "west", "reason": "not-finite"}] if number == 2 else [],
                "train_loss": 3.0 - number,
                "valid_loss": 4.0 - number,
                "bytes_up": 10 * number,
                "bytes_down": 20 * number,
                "seconds": 1.5,
                "confidentiality": SECAGG if number == 2 else None,
                "privacy": None,
                "sent": "AB" if number == 2 else None,
                "product_error": 0.25 if number == 2 else None,
                "ranks": RANKS.model_dump() if number == 2 else None,
                "has_memory": False,
                "has_product": False,
                "max_ranks": {"north": 8} if number == 2 else {},
                "verdicts": 2 if number == 2 else 0,
                "accepted": 1 if number == 2 else 0,
            }
            for number in (1, 2)
        ],
        "valid_loss": {
            "base": 4.0,
            "final": 2.0,
            "per_clinic": {
                "north": {"base": 4.5, "final": 2.5},
                "south": {"base": 3.5, "final": 2.5},
            },
        },
        "confidentiality": {
            "mode": "secagg",
            "threshold": 3,
            "survivors": 4,
            "bits": 16,
            "wire_bytes_per_coordinate": 2.25,
        },
        "exact_match": None,
        "privacy": None,
    }


LOSS: dict[str, Any] = {
    "epsilon": 2.5,
    "delta": 1e-5,
    "epsilon_rdp": 3.0,
    "steps": 7,
    "noise_multiplier": 1.0,
    "clip": 0.5,
}


def test_the_summary_of_a_noisy_run_has_the_losses_of_its_clinics(tmp_path: Path):
    privacy = {"unit": "record", "noise_multiplier": 1.0}
    run = run_in(tmp_path, altered(privacy=privacy))
    run.open(BASE)
    spent = PrivacyRecord.model_validate({"clinics": {"north": LOSS}})
    for number in (0, 1):
        run.save_round(record(number, privacy=spent if number else None), outcome(number))
    found = json.loads((run.path / "summary.json").read_text())
    assert found["privacy"].keys() == {
        "unit",
        "mechanism",
        "epsilon_goal",
        "private",
        "clinics",
        "assumptions",
    }
    assert found["privacy"]["clinics"] == {"north": LOSS}
    assert found["rounds"][0]["privacy"]["clinics"]["north"]["epsilon"] == 2.5


@pytest.mark.parametrize(
    "change", [{"clip": 2.0}, {"noise_multiplier": 0.5}, {"test_seed": 1}, {"unit": "patient"}]
)
def test_a_run_does_not_go_on_under_other_privacy(change: dict[str, Any], tmp_path: Path):
    privacy = {"unit": "record", "noise_multiplier": 1.0}
    run = run_in(tmp_path, altered(privacy=privacy))
    run.open(BASE)
    run.save_round(record(0), outcome(0))
    for other in ({**privacy, **change}, None):
        with pytest.raises(StorageError, match="holds a run with other settings"):
            run_in(tmp_path, altered(privacy=other)).open(BASE)


LATER = [
    *("sent", "product_error", "ranks", "has_memory", "has_product", "max_ranks"),
    *("verdicts", "accepted"),
]
"""What rounds of release 0.3 and later say."""


@pytest.mark.parametrize("missing", [["confidentiality", "privacy", *LATER], LATER])
def test_a_round_of_an_older_release_keeps_loading(
    missing: list[str], run: RunDirectory, tmp_path: Path
):
    path = run.path / "rounds" / "1" / "round.json"
    content = json.loads(path.read_text())
    for key in missing:
        del content[key]
    path.write_text(json.dumps(content))
    assert run.records() == [record(0), record(1)]
    assert_round_1_is_last(tmp_path)
    found = run.outcome_of(1, SCHEMA)
    assert (found.memory, found.increments) == ({}, ())


def test_a_run_without_validation_has_no_losses(tmp_path: Path):
    run = run_in(tmp_path)
    run.open(BASE)
    run.save_round(record(0, valid_loss=None, per_clinic={}), outcome(0))
    summary = json.loads((run.path / "summary.json").read_text())
    assert summary["rounds"] == []
    assert summary["valid_loss"] == {"base": None, "final": None, "per_clinic": {}}


def test_the_adapter_of_a_run_is_stock_peft(run: RunDirectory):
    config = json.loads((run.path / "adapter" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 2, 16.0)
    assert SETTINGS.adapter == AdapterSettings(rank=2)
    assert math.prod(state(0).tensors()["base_model.m.lora_A.weight"].shape) == 8
