"""What strategies and clinics keep between rounds, also when a program is killed."""

from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fedpeft.simulation.run import Simulation, simulate
from fedpeft_client.rounds.clinic import Clinic
from tests.integration.federations import (
    Boxes,
    Listener,
    adapter_after,
    federation,
    product_distance,
    run,
)

FILE = "adapter_model.safetensors"
REMEMBERING: dict[str, tuple[str, dict[str, Any]]] = {
    "the turn of a factor": ("alternating", {}),
    "moments of each factor": ("fedadam", {"inner": "alternating"}),
    "momentum": ("fedavgm", {}),
    "a turned A": ("ffa", {"reorthonormalize": True}),
    "products beside an adapter": ("fedex", {}),
    "products alone": ("flora", {}),
    "factors of each clinic": ("fedsa", {}),
}


@pytest.mark.parametrize("what", REMEMBERING)
def test_a_run_that_was_killed_ends_as_one_that_was_not(
    what: str, tmp_path: Path, tiny_model: Path
) -> None:
    name, settings = REMEMBERING[what]

    def plan(folder: str) -> Simulation:
        return federation(tmp_path / folder, tiny_model, name, clinics=3, settings=settings)

    whole, killed = plan("whole"), plan("killed")
    expected = run(whole).records
    # In round 2 the clinics have trained for nothing; before round 3 all is durable.
    for stop in ((2, "evaluate"), (3, "train")):
        with pytest.raises(KeyboardInterrupt):
            simulate(killed, Listener(stop))
    (last,) = run(killed).records
    assert (killed.out / "adapter" / FILE).read_bytes() == (
        whole.out / "adapter" / FILE
    ).read_bytes()
    # The loss also tells of what clinics keep to themselves.
    assert last.valid_loss == expected[-1].valid_loss
    one, other = (adapter_after(killed, number) for number in (3, 2))
    assert one.schema != other.schema or not one.values.equal(other.values)


class Restarting(Listener):
    """Starts a clinic's program anew before a round."""

    def __init__(self, boxes: Boxes, name: str, number: int) -> None:
        super().__init__()
        self._restart = (boxes, name, number)

    def asked(self, number: int, kind: str, clinics: list[str]) -> None:
        boxes, name, when = self._restart
        if (number, kind) == (when, "train"):
            boxes.restart(name)


@pytest.mark.parametrize("mode", ["sealed", "secagg"])
def test_a_clinic_that_is_started_anew_is_sent_the_whole_adapter_and_no_round_is_lost(
    mode: str, tmp_path: Path, tiny_model: Path
) -> None:
    plans = [federation(tmp_path / name, tiny_model, mode=mode, clinics=3) for name in "ab"]
    calm, disturbed = Boxes(plans[0]), Boxes(plans[1])
    undisturbed, listener = Listener(), Restarting(disturbed, "c1", 2)
    calm.run(undisturbed)
    disturbed.run(listener)
    assert calm.refusals == []
    assert disturbed.refusals == [("c1", "adapter-not-held")]
    assert listener.repeated == []
    for record in listener.records[1:]:
        assert (record.participants, record.failed) == (("c0", "c1", "c2"), ())
    more = [
        with_it.bytes_down - without.bytes_down
        for with_it, without in zip(listener.records, undisturbed.records, strict=True)
    ]
    whole = adapter_after(plans[0], 0).schema.numel * 4
    # The request that was refused, and the same again with everything.
    assert whole < more[2] < 2 * whole
    assert max(more[0], more[1], more[3]) < whole / 20
    if mode == "sealed":
        # What was asked for twice is the last to be added up, which float32 tells.
        start, without, with_it = (
            adapter_after(plan, number)
            for plan, number in ((plans[0], 0), *((p, 3) for p in plans))
        )
        learnt = product_distance(without, start)
        assert product_distance(with_it, without) < 1e-5 * learnt


# FedSA: what is personal


def boxes_at(folder: Path, plan: Simulation) -> Boxes:
    """Clinics that keep their things in ``folder``, as those of ``client.toml`` do."""

    def settled(clinic: Clinic) -> Clinic:
        home = folder / clinic.name
        home.mkdir(parents=True)
        return replace(
            clinic,
            adapter_directory=home / "adapter",
            limits=clinic.limits.model_copy(update={"min_free_disk_mb": 0}),
        )

    return Boxes(plan, settled)


def kept(boxes: Boxes, factor: str) -> dict[str, torch.Tensor]:
    """One factor, as a vector, of the adapter that each clinic keeps."""
    found: dict[str, torch.Tensor] = {}
    for clinic in boxes.clinics:
        assert clinic.adapter_directory is not None
        tensors = load_file(clinic.adapter_directory / FILE)
        names = [name for name in sorted(tensors) if f".lora_{factor}." in name]
        found[clinic.name] = torch.cat([tensors[name].reshape(-1) for name in names])
    return found


@dataclass(frozen=True)
class Personal:
    """A run of ``fedsa`` over boxes."""

    plan: Simulation
    boxes: Boxes
    heard: Listener


@pytest.fixture(scope="module")
def personal(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Personal:
    folder = tmp_path_factory.mktemp("fedsa")
    plan = federation(folder, tiny_model, "fedsa", clinics=3)
    boxes, heard = boxes_at(folder / "boxes", plan), Listener()
    boxes.run(heard)
    assert (boxes.refusals, heard.repeated) == ([], [])
    return Personal(plan, boxes, heard)


def test_each_clinic_has_a_b_of_its_own_and_all_have_one_a(personal: Personal) -> None:
    shared = adapter_after(personal.plan, 3)
    assert all(a.equal(shared.part("A").values) for a in kept(personal.boxes, "A").values())
    assert not shared.part("A").values.equal(adapter_after(personal.plan, 0).part("A").values)
    for one, other in combinations(kept(personal.boxes, "B").values(), 2):
        assert float((one - other).norm()) > 0.1 * float(one.norm()) > 0


def test_no_b_leaves_a_clinic(personal: Personal) -> None:
    whole = adapter_after(personal.plan, 3)
    assert len(personal.boxes.added) == 9
    assert {each.change.schema.hash for each in personal.boxes.added} == {
        whole.schema.part("A").hash
    }
    assert not whole.part("B").values.any()
    for record in personal.heard.records[1:]:
        # All that came, with what the messages themselves take, is shorter than both factors.
        assert record.bytes_up < 3 * 4 * whole.schema.numel


def test_a_clinic_that_is_started_anew_goes_on_with_its_own_b(
    personal: Personal, tmp_path: Path, tiny_model: Path
) -> None:
    plan = federation(tmp_path / "f", tiny_model, "fedsa", clinics=3)
    boxes = boxes_at(tmp_path / "boxes", plan)
    listener = Restarting(boxes, "c1", 3)
    boxes.run(listener)
    assert boxes.refusals == [("c1", "adapter-not-held")]
    expected, found = kept(personal.boxes, "B"), kept(boxes, "B")
    assert all(found[name].equal(b) for name, b in expected.items())
    losses, before = (heard.records[-1].per_clinic for heard in (listener, personal.heard))
    # The sum of A is added up in another order.
    assert losses == pytest.approx(before, rel=1e-6)
