"""What a run asks of its clinics in privacy, what it adds itself, and what it writes down."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from fedpeft.adapters import AdapterSchema, AdapterState, TensorSpec
from fedpeft.config import FederationSettings
from fedpeft.errors import AdapterError
from fedpeft.privacy.accounting import epsilon_of
from fedpeft.privacy.charge import Charge
from fedpeft.protocol import Job, Payload
from fedpeft.protocol.privacy import PRIVACY, ClinicPrivacy, clinic_privacy
from fedpeft_server.rounds.collection import privacy_of
from fedpeft_server.rounds.narration import privacy_sentences, round_sentence
from fedpeft_server.rounds.outcome import Outcome
from fedpeft_server.rounds.privacy_record import PrivacyRecord, summary_of
from fedpeft_server.rounds.shield import CentralShield, shield_of
from fedpeft_server.runs.directory import RoundRecord, RunDirectory

SIZE = 8000
SCHEMA = AdapterSchema((TensorSpec("m.lora_A.weight", (8, SIZE // 8)),), "a" * 64)
LOCAL: dict[str, Any] = {"unit": "record", "noise_multiplier": 1.0}
SHARED: dict[str, Any] = {"unit": "patient", "mechanism": "distributed", "noise_multiplier": 1.0}
CENTRAL: dict[str, Any] = {"unit": "clinic", "mechanism": "central", "noise_multiplier": 1.0}
ONE_STEP = {"local_steps": 1, "optimizer": "sgd"}


def settings_of(privacy: dict[str, Any] | None, **changes: Any) -> FederationSettings:
    content: dict[str, Any] = {"name": "sea", "training": ONE_STEP, "privacy": privacy}
    return FederationSettings.model_validate({**content, **changes})


def central(*, sealed: bool = True, **changes: Any) -> CentralShield:
    mode = {"confidentiality": "sealed" if sealed else "secagg"}
    shield = shield_of(settings_of({**CENTRAL, **changes}, aggregation=mode), SIZE)
    assert isinstance(shield, CentralShield)
    return shield


NOTHING = torch.zeros(SIZE)


# What is refused, and what is warned of


@pytest.mark.parametrize("text", ["", "{}", '{"epsilon": -1}', '{"epsilon": NaN}', "null"])
def test_a_clinic_that_reports_no_usable_loss_is_not_used(text: str):
    with pytest.raises(AdapterError, match="clinic north reports no usable privacy loss"):
        clinic_privacy(text, source="clinic north")


@pytest.mark.parametrize("asked", [LOCAL, SHARED], ids=["local", "shared"])
def test_a_clinic_must_report_what_a_noisy_round_cost_it(asked: dict[str, Any]):
    settings = settings_of(asked)
    job = job_of(settings)
    with pytest.raises(AdapterError, match="no usable privacy loss"):
        privacy_of("north", Payload(), job)
    told = clinic_loss(2.0)
    assert privacy_of("north", Payload({PRIVACY: told.model_dump_json()}), job) == {"north": told}


@pytest.mark.parametrize("asked", [None, CENTRAL], ids=["none", "central"])
def test_elsewhere_what_a_clinic_says_of_privacy_is_not_read(asked: dict[str, Any] | None):
    assert privacy_of("north", Payload({PRIVACY: "?"}), job_of(settings_of(asked))) == {}


def clinic_loss(epsilon: float | None, **changes: Any) -> ClinicPrivacy:
    content = {"delta": 1e-5, "epsilon_rdp": epsilon, "steps": 3, "noise_multiplier": 1, "clip": 1}
    return ClinicPrivacy.model_validate({"epsilon": epsilon, **content, **changes})


def job_of(settings: FederationSettings) -> Job:
    shield = shield_of(settings, SIZE)
    return Job(
        run="0" * 32,
        federation="sea",
        fingerprint="a" * 64,
        quantization="none",
        adapter=settings.adapter,
        training=settings.training,
        aggregation=shield.terms(1.0),
        privacy=shield.asked(),
        round=1,
        rounds=5,
    )


@pytest.mark.parametrize("asked", [LOCAL, SHARED, CENTRAL], ids=["local", "shared", "central"])
def test_a_seed_for_tests_never_travels(asked: dict[str, Any]):
    job = job_of(settings_of({**asked, "test_seed": 271828}))
    assert job.privacy is not None and job.privacy.test_seed is None
    assert "271828" not in job.to_json()


@pytest.mark.parametrize("clinics", [0, 3, 10])
def test_too_few_clinics_for_central_noise_are_told_how_many_it_takes(clinics: int):
    said = central().caution(clinics)
    ratio = math.sqrt(SIZE / 0.75) / max(clinics, 3)
    assert f"{ratio:.1f} times as large" in said
    assert f"needs about {math.ceil(math.sqrt(SIZE / 0.75)):,} clinics" in said


def test_enough_clinics_and_noise_elsewhere_need_no_caution():
    assert central().caution(104) == ""
    assert "times as large" in central().caution(103)
    assert shield_of(settings_of(LOCAL), SIZE).caution(1) == ""


# What clinics are asked


def test_under_distributed_noise_no_sum_of_fewer_than_the_honest_clinics_is_meant():
    assert shield_of(settings_of(SHARED), SIZE).least == 3
    shield = shield_of(settings_of({**SHARED, "honest_clinics": 6}), SIZE)
    asked = shield.asked()
    assert asked is not None
    assert (shield.least, asked.honest_clinics) == (6, 6)


@pytest.mark.parametrize("asked", [None, LOCAL, CENTRAL], ids=["none", "local", "central"])
def test_other_noise_needs_no_number_of_clinics(asked: dict[str, Any] | None):
    assert shield_of(settings_of(asked), SIZE).least == 0


def test_whole_numbers_of_a_grid_are_summed_as_they_are():
    terms = shield_of(settings_of(SHARED), SIZE).terms(0.1)
    assert (terms.bits, terms.limit) == (24, 2**23 - 1)
    plain = shield_of(settings_of(LOCAL), SIZE).terms(0.1)
    assert (plain.bits, plain.limit) == (16, 0.1)


def test_central_noise_is_named_in_numbers_and_no_coordinate_is_beyond_the_clip():
    shield = central(noise_multiplier="auto", epsilon=4.0, clip=0.25)
    asked = shield.asked()
    assert asked is not None and asked.noise_multiplier != "auto"
    assert (asked.clip, shield.terms(9.0).limit) == (0.25, 0.25)
    charge = Charge(noise="gaussian", noise_multiplier=asked.noise_multiplier)
    assert epsilon_of({charge: 5}, 1e-5).epsilon <= 4.0


# What is written down


FIGURES = {"epsilon", "delta", "epsilon_rdp", "steps", "noise_multiplier", "clip"}


@pytest.mark.parametrize(
    ("asked", "figures"),
    [
        (LOCAL, FIGURES),
        (SHARED, FIGURES | {"epsilon_outside", "epsilon_alone"}),
        (CENTRAL, FIGURES),
    ],
    ids=["local", "shared", "central"],
)
def test_the_summary_has_the_last_figures_of_every_clinic(asked: dict[str, Any], figures: set[str]):
    first = PrivacyRecord(clinics={"south": clinic_loss(1.0), "north": clinic_loss(1.0)})
    second = PrivacyRecord(clinics={"north": clinic_loss(2.0)})
    summary = summary_of(settings_of(asked), [None, first, second])
    assert summary is not None
    assert set(summary) == {
        "unit",
        "mechanism",
        "epsilon_goal",
        "private",
        "clinics",
        "assumptions",
    }
    assert (summary["unit"], summary["private"]) == (asked["unit"], True)
    assert list(summary["clinics"]) == ["north", "south"]
    assert [found["epsilon"] for found in summary["clinics"].values()] == [2.0, 1.0]
    assert all(set(found) == figures for found in summary["clinics"].values())


def test_a_run_without_noise_has_no_figures():
    assert summary_of(settings_of(None), [None, None]) is None


def test_the_lines_for_people_name_the_largest_loss_first_and_round_up():
    losses = {
        "a": clinic_loss(1.001),
        "b": clinic_loss(None),
        "c": clinic_loss(3.0, epsilon_outside=2.0, epsilon_alone=None),
    }
    record = round_of(PrivacyRecord(clinics=losses))
    lines = privacy_sentences([record])
    assert [line.split(":")[0].removeprefix("privacy of ") for line in lines] == ["b", "c", "a"]
    assert "epsilon without bound" in lines[0]
    assert "outside 2.00, own share alone without bound" in lines[1]
    assert "epsilon 1.01 at delta 1e-05" in lines[2]
    assert round_sentence(record, 5).endswith("; privacy loss without bound (b)")


def round_of(privacy: PrivacyRecord) -> RoundRecord:
    return RoundRecord(
        round=1,
        participants=tuple(privacy.clinics),
        failed=(),
        train_loss=None,
        valid_loss=None,
        per_clinic={},
        bytes_up=1,
        bytes_down=1,
        seconds=1.0,
        privacy=privacy,
    )


def test_privacy_survives_on_disk(tmp_path: Path):
    run = RunDirectory(tmp_path / "run", settings_of(LOCAL), engine="local")
    run.open("a" * 64)
    record = round_of(PrivacyRecord(clinics={"c0": clinic_loss(None)}))
    outcome = Outcome(adapter=AdapterState(SCHEMA, NOTHING))
    run.save_round(record.model_copy(update={"round": 0}), outcome)
    run.save_round(record, outcome)
    assert run.records()[1] == record
