"""What made each adapter of a run: by secure sums, with noise, after restarts, after old rounds."""

from dataclasses import replace
from pathlib import Path

import pytest

from fedpeft.errors import LineageRefused
from fedpeft.protocol.lineage_check import Ancestry, check_directory, sentences
from fedpeft_client.rounds.clinic import Clinic
from fedpeft_client.settings import LimitSettings
from tests.integration.federations import Boxes, Listener, federation

QUICK = {"local_steps": 1, "learning_rate": 1e-3}


def checked(boxes: Boxes, number: int) -> Ancestry:
    place = boxes.simulation.out / "rounds" / str(number) / "adapter"
    return check_directory(place, boxes._server.public)


def without_training(name: str, clinic: Clinic) -> Clinic:
    """A clinic that measures, and refuses to train at any rank."""
    limits = LimitSettings(max_rank=1, min_free_disk_mb=0)
    return replace(clinic, limits=limits) if clinic.name == name else clinic


def test_under_secure_aggregation_the_clinics_in_the_sum_are_named(
    tmp_path: Path, tiny_model: Path
) -> None:
    simulation = federation(
        tmp_path,
        tiny_model,
        "fedavg",
        mode="secagg",
        clinics=4,
        training=QUICK,
        rounds={"count": 2, "minimum_clinics": 3},
        privacy={"unit": "patient", "noise_multiplier": 1.0},
    )
    boxes = Boxes(simulation, lambda clinic: without_training("c3", clinic))
    listener = Listener()
    boxes.run(listener)

    assert {failed.clinic for failed in listener.records[1].failed} == {"c3"}
    for number in (1, 2):
        lineage = checked(boxes, number).signed.lineage
        assert lineage.of_round() == list(listener.records[number].participants)
        assert list(lineage.clinics) == ["c0", "c1", "c2"]
        assert lineage.mode == "secagg"
    own = {clinic.name: clinic.membership.identity.public for clinic in boxes.clinics}
    for name, one in lineage.clinics.items():
        assert (one.fingerprint, one.rounds) == (own[name].fingerprint, "1-2")
    # What it cost is the most that one of them reported, and names none.
    record = listener.records[2].privacy
    assert record is not None
    assert lineage.privacy is not None
    assert lineage.privacy.spent is not None
    assert lineage.privacy.spent.epsilon == max(
        loss.epsilon or 0.0 for loss in record.clinics.values()
    )
    assert "sums over these clinics only" in "\n".join(sentences(checked(boxes, 2)))


def test_a_run_that_goes_on_under_another_identity_stays_one_chain(
    tmp_path: Path, tiny_model: Path
) -> None:
    simulation = federation(tmp_path, tiny_model, "fedavg", clinics=2, training=QUICK)
    first = Boxes(simulation)
    with pytest.raises(KeyboardInterrupt):
        first.run(Listener(stop=(2, "train")))
    second = Boxes(simulation)
    second.run(Listener())

    found = checked(second, 3)
    assert (found.checked, found.unchecked) == ((2, 1, 0), None)
    assert checked(first, 1).signed.signer == first._server.public.fingerprint
    with pytest.raises(LineageRefused, match="was signed by"):
        checked(second, 1)
    assert {one.rounds for one in found.signed.lineage.clinics.values()} == {"1-3"}
    assert found.signed.lineage.run == checked(first, 1).signed.lineage.run


def test_rounds_of_a_release_before_lineages_are_named_from_their_records(
    tmp_path: Path, tiny_model: Path
) -> None:
    simulation = federation(tmp_path, tiny_model, "fedavg", clinics=2, training=QUICK)
    with pytest.raises(KeyboardInterrupt):
        Boxes(simulation).run(Listener(stop=(3, "train")))
    for path in simulation.out.rglob("lineage.json"):
        path.unlink()
    again = Boxes(simulation)
    again.run(Listener())

    found = checked(again, 3)
    assert (found.checked, found.unchecked) == ((), 2)
    assert {n: one.rounds for n, one in found.signed.lineage.clinics.items()} == {
        "c0": "1-3",
        "c1": "1-3",
    }
    assert (simulation.out / "adapter" / "lineage.json").read_bytes() == found.signed.to_bytes()


def test_products_for_the_base_model_are_in_the_signed_adapter(
    tmp_path: Path, tiny_model: Path
) -> None:
    simulation = federation(
        tmp_path, tiny_model, "flora", clinics=2, training=QUICK, rounds={"count": 2}
    )
    boxes = Boxes(simulation)
    boxes.run(Listener())
    found = checked(boxes, 2)
    assert found.unchecked is None
    assert found.signed.lineage.weights.rank > simulation.settings.adapter.rank
