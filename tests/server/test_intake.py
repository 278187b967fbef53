"""The way of a round's updates to the strategy: what the server clips, adds and counts."""

import math
from typing import Any

import pytest
import torch

from fedpeft.adapters import AdapterSchema, AdapterState, TensorSpec
from fedpeft.config import FederationSettings
from fedpeft.errors import AdapterError, SchemaMismatch
from fedpeft.privacy.accounting import epsilon_of
from fedpeft.privacy.charge import Charge
from fedpeft.protocol.privacy import ClinicPrivacy
from fedpeft_server.rounds.collection import Collected
from fedpeft_server.rounds.intake import CentralIntake
from fedpeft_server.rounds.privacy_record import PrivacyRecord, summary_of
from fedpeft_server.rounds.shield import CentralShield, Shield, shield_of
from fedpeft_strategies.strategy import Aggregated, Fold

SIZE = 8000
SCHEMA = AdapterSchema((TensorSpec("m.lora_A.weight", (8, SIZE // 8)),), "a" * 64)
LOCAL: dict[str, Any] = {"unit": "record", "noise_multiplier": 1.0}
LOSS = ClinicPrivacy(epsilon=2.0, delta=1e-5, epsilon_rdp=2.0, steps=3, noise_multiplier=1, clip=1)
CENTRAL: dict[str, Any] = {"unit": "clinic", "mechanism": "central", "noise_multiplier": 1.0}


def settings_of(privacy: dict[str, Any] | None, **changes: Any) -> FederationSettings:
    return FederationSettings.model_validate({"name": "sea", "privacy": privacy, **changes})


def central(*, sealed: bool = True, **changes: Any) -> CentralShield:
    mode = {"confidentiality": "sealed" if sealed else "secagg"}
    shield = shield_of(settings_of({**CENTRAL, **changes}, aggregation=mode), SIZE)
    assert isinstance(shield, CentralShield)
    return shield


class Heard(Fold):
    """A strategy that only listens."""

    def __init__(self) -> None:
        self.got: list[tuple[torch.Tensor, float]] = []

    def add(self, change: AdapterState, weight: float) -> None:
        assert change.schema == SCHEMA
        self.got.append((change.values, weight))

    def result(self) -> Aggregated:
        raise NotImplementedError


def pointing(norm: float, seed: int = 0) -> torch.Tensor:
    values = torch.randn(SIZE, generator=torch.Generator().manual_seed(seed))
    return values * (norm / torch.linalg.vector_norm(values.double())).float()


def taken(
    shield: Shield, *updates: tuple[torch.Tensor, int], got: Collected | None = None
) -> tuple[list[tuple[torch.Tensor, float]], PrivacyRecord | None]:
    """Return what a strategy is given of ``updates``, and what that cost.

    Each update is that of one clinic, unless ``got`` says who took part.
    """
    heard = Heard()
    intake = shield.intake(heard, SCHEMA)
    for values, rows in updates:
        intake.add(AdapterState(SCHEMA, values), rows)
    names = tuple(f"c{at}" for at in range(len(updates)))
    return heard.got, intake.close(got or Collected(participants=names))


def released(
    shield: Shield, *updates: tuple[torch.Tensor, int], got: Collected | None = None
) -> tuple[torch.Tensor, PrivacyRecord]:
    """Return the one private mean that a strategy sees, and what it cost."""
    ((values, _),), record = taken(shield, *updates, got=got)
    assert record is not None
    return values, record


NOTHING = torch.zeros(SIZE)


# What is refused


def test_a_private_mean_of_no_updates_is_refused():
    with pytest.raises(AdapterError, match="no updates is undefined"):
        released(central())


def test_an_update_of_another_part_than_was_asked_for_is_refused():
    intake = central().intake(Heard(), SCHEMA)
    other = AdapterSchema((TensorSpec("m.lora_B.weight", (SIZE // 8, 8)),), "a" * 64)
    with pytest.raises(SchemaMismatch):
        intake.add(AdapterState(other, NOTHING), 1.0)


def test_the_strategy_sees_nothing_before_the_noise_is_there():
    heard = Heard()
    intake = central().intake(heard, SCHEMA)
    assert isinstance(intake, CentralIntake)
    intake.add(AdapterState(SCHEMA, pointing(1.0)), 3)
    assert heard.got == []
    intake.close(Collected(participants=("c0",)))
    assert len(heard.got) == 1
    assert not torch.equal(heard.got[0][0], pointing(1.0))


# What the server adds


def test_the_noise_follows_the_largest_share_of_the_rows():
    """The peers' fault: clip / n would be 2.4 times too little for 8 : 1 : 1."""
    got = (NOTHING, 800), (NOTHING, 100), (NOTHING, 100)
    values, record = released(central(clip=0.5, test_seed=1), *got)
    z_update = 1 / math.sqrt(0.75)
    assert float(values.std()) == pytest.approx(z_update * 0.5 * 0.8, rel=0.03)
    assert record.noise_to_signal == pytest.approx(z_update * 0.8 * math.sqrt(SIZE))


def test_sums_count_all_clinics_alike():
    got = Collected(participants=("a", "b", "c", "d"), within_clip=4)
    shield = central(sealed=False, clip=0.5, test_seed=1)
    values, _ = released(shield, (NOTHING, 1000), got=got)
    rounding = 1 + math.sqrt(SIZE) / (2**15 - 1)
    expected = 0.5 * rounding / 4 / math.sqrt(0.75)
    assert float(values.std()) == pytest.approx(expected, rel=0.03)


def test_of_a_sum_the_clinics_count_who_was_within_the_clip():
    """The server cannot: it sees the mean only."""
    quiet: dict[str, Any] = {"noise_multiplier": 1e-3, "clip": 0.7, "test_seed": 1}
    names = tuple(f"c{at}" for at in range(10))
    for within, sign in ((10, -1), (0, 1)):
        got = Collected(participants=names, within_clip=within)
        shield = central(sealed=False, **quiet)
        _, record = released(shield, (pointing(0.01), 100), got=got)
        assert record.next_clip == pytest.approx(0.7 * math.exp(sign * 0.2 * 0.5), rel=1e-3)


def test_an_update_that_a_clinic_left_uncut_is_cut_here():
    tiny: dict[str, Any] = {"noise_multiplier": 1e-4, "clip": 0.5, "test_seed": 1}
    values, _ = released(central(**tiny), (pointing(50.0), 10))
    assert float(torch.linalg.vector_norm(values)) == pytest.approx(0.5, rel=0.01)
    direction = torch.nn.functional.cosine_similarity(values, pointing(1.0), dim=0)
    assert float(direction) > 0.99


def test_updates_within_the_clip_are_averaged_by_their_rows():
    tiny: dict[str, Any] = {"noise_multiplier": 1e-4, "clip": 1.0, "test_seed": 1}
    one, other = pointing(0.5, 1), pointing(0.7, 2)
    values, _ = released(central(**tiny), (one, 30), (other, 10))
    assert float((values - (0.75 * one + 0.25 * other)).abs().max()) < 1e-3


def test_the_strategy_sees_one_private_answer_with_all_rows():
    seen, _ = taken(central(test_seed=1), (NOTHING, 8), (NOTHING, 5))
    ((_, weight),) = seen
    assert weight == 13


def test_updates_that_clinics_cut_to_the_clip_are_counted_as_cut():
    """In float32 half of them come out a little shorter than the clip."""
    quiet: dict[str, Any] = {"noise_multiplier": 1e-3, "clip": 0.7, "test_seed": 1}
    cut = [(pointing(0.7, seed), 1) for seed in range(10)]
    _, record = released(central(**quiet), *cut)
    assert record.next_clip == pytest.approx(0.7 * math.exp(0.2 * 0.5), rel=1e-3)
    short = [(pointing(0.6, seed), 1) for seed in range(10)]
    _, record = released(central(**quiet), *short)
    assert record.next_clip == pytest.approx(0.7 * math.exp(-0.2 * 0.5), rel=1e-3)


@pytest.mark.parametrize("asked", [LOCAL, None], ids=["local", "none"])
def test_without_noise_of_its_own_a_server_passes_everything_on(asked: dict[str, Any] | None):
    told = {"c0": LOSS}
    got = Collected(participants=("c0",), privacy=told)
    updates = [(pointing(9.0, 1), 3), (pointing(0.1, 2), 5)]
    seen, record = taken(shield_of(settings_of(asked), SIZE), *updates, got=got)
    assert [(values.tolist(), weight) for values, weight in seen] == [
        (values.tolist(), rows) for values, rows in updates
    ]
    assert record == (PrivacyRecord(clinics=told) if asked else None)


# A run that goes on


def test_clip_and_losses_go_on_with_the_run():
    running = central()
    _, first = released(running, (NOTHING, 1), (NOTHING, 1))
    running.follow(first)
    restarted = central()
    restarted.follow(PrivacyRecord.model_validate_json(first.model_dump_json()))
    for shield in (running, restarted):
        asked = shield.asked()
        assert asked is not None
        assert asked.clip == first.next_clip != first.clip == 1.0
        _, second = released(shield, (NOTHING, 1), (NOTHING, 1), (NOTHING, 1))
        steps = {name: loss.steps for name, loss in second.clinics.items()}
        assert steps == {"c0": 2, "c1": 2, "c2": 1}
        gaussian = Charge(noise="gaussian", noise_multiplier=1.0)
        assert second.clinics["c0"].epsilon == epsilon_of({gaussian: 2}, 1e-5).epsilon


def test_a_clinic_that_was_away_keeps_what_it_spent():
    shield = central()
    for clinics in (2, 1):
        _, record = released(shield, *[(NOTHING, 1)] * clinics)
        shield.follow(record)
    _, record = released(shield, (NOTHING, 1), (NOTHING, 1))
    assert {name: loss.steps for name, loss in record.clinics.items()} == {"c0": 3, "c1": 2}


def test_a_run_with_a_known_seed_is_marked_and_has_no_epsilon():
    shield = central(test_seed=5)
    _, record = released(shield, (NOTHING, 1))
    settings = settings_of({**CENTRAL, "test_seed": 5}, aggregation={"confidentiality": "sealed"})
    summary = summary_of(settings, [None, record])
    assert summary is not None
    assert summary["private"] is False
    assert summary["clinics"]["c0"]["epsilon"] is None
    assert any("NOT PRIVATE" in sentence for sentence in summary["assumptions"])
