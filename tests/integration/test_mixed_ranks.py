"""Clinics of different ranks in one run: whose columns count where, and what a sum must hide."""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fedpeft_server.rounds.loop
from fedpeft.adapters import AdapterState, pairs
from fedpeft.errors import FederationError
from fedpeft.protocol import RankTerms
from fedpeft.simulation.run import Simulation
from fedpeft_server.rounds.ranks import RankPlan
from fedpeft_server.runs.directory import RoundRecord
from fedpeft_strategies.declaration import RankRule
from tests.integration.federations import (
    Added,
    Boxes,
    Listener,
    adapter_after,
    federation,
    product_distance,
    rows_of,
)

HIGH = (8, 8, 8, 2)
HALVES = (8, 8, 8, 2, 2, 2)
LONE = (2, 8, 2, 2)
SGD = {"optimizer": "sgd", "learning_rate": 0.5}
ADAMW = {"optimizer": "adamw", "learning_rate": 5e-3}
Factor = dict[str, torch.Tensor]


def run_boxes(
    folder: Path,
    model: Path,
    ranks: tuple[int, ...],
    strategy: str = "alternating",
    mode: str = "sealed",
    training: dict[str, Any] = SGD,
) -> tuple[Boxes, Listener]:
    """Run clinics of these largest ranks for two rounds."""
    plan = federation(
        folder, model, strategy, mode=mode, ranks=ranks, training=training, rounds={"count": 2}
    )
    boxes, listener = Boxes(plan), Listener()
    boxes.run(listener)
    return boxes, listener


def named(state: AdapterState) -> Factor:
    """Factors by name in float64, with the rank as their last dimension."""
    tensors = {name: tensor.double() for name, tensor in state.tensors().items()}
    return {name: t.T if "lora_A" in name else t for name, t in tensors.items()}


def mean_by_column(boxes: Boxes, number: int) -> Factor:
    """The dense reference: a column's mean over the clinics that trained it, by their rows."""
    added = [each for each in boxes.added if each.round == number]
    sums: Factor = {}
    weights = torch.zeros(8, dtype=torch.float64)
    for each in added:
        weights[: each.change.schema.rank] += each.weight
        for name, values in named(each.change).items():
            wide = torch.zeros(len(values), 8, dtype=torch.float64)
            wide[:, : values.shape[1]] = values
            sums[name] = sums.get(name, torch.zeros_like(wide)) + each.weight * wide
    return {name: values / weights for name, values in sums.items()}


def with_change(state: AdapterState, change: Factor) -> AdapterState:
    tensors = state.tensors()
    moved = {
        name: tensor + (change[name].T if "lora_A" in name else change[name]).float()
        if name in change
        else tensor
        for name, tensor in tensors.items()
    }
    return AdapterState.from_tensors(moved, state.schema)


def by_clinic(boxes: Boxes) -> Boxes:
    """Return ``boxes`` with every clinic's update counted once, whatever its rows."""
    return replace(boxes, added=[replace(each, weight=1) for each in boxes.added])


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> tuple[Boxes, Listener]:
    return run_boxes(tmp_path_factory.mktemp("opened") / "f", tiny_model, HIGH)


def test_each_column_is_the_mean_of_the_clinics_that_train_it(
    opened: tuple[Boxes, Listener],
) -> None:
    boxes, listener = opened
    assert (boxes.refusals, listener.warnings, listener.repeated) == ([], [], [])
    for number, factor in ((1, "B"), (2, "A")):
        added = [each for each in boxes.added if each.round == number]
        assert sorted(each.change.schema.rank for each in added) == [2, 8, 8, 8]
        assert [each.change.schema.factors for each in added] == [factor] * 4
        assert sorted(each.weight for each in added) == [rows_of(at) for at in range(4)]
        # The clinic of rank 2 changed its columns, and not by what the others did.
        (small,) = (each.change for each in added if each.change.schema.rank == 2)
        assert small.norm() > 0
        before, after = (adapter_after(boxes.simulation, at) for at in (number - 1, number))
        expected = with_change(before, mean_by_column(boxes, number))
        assert product_distance(after, expected) < 1e-5 * product_distance(expected, before)


@pytest.mark.parametrize(("ranks", "alike"), [(HALVES, False), (HIGH, True)])
def test_a_secure_sum_gives_the_mean_by_column_of_those_who_trained_it(
    ranks: tuple[int, ...], alike: bool, tmp_path: Path, tiny_model: Path
) -> None:
    """By their rows where each rank has three clinics, and else by their number."""
    opened, _ = run_boxes(tmp_path / "o", tiny_model, ranks)
    boxes, listener = run_boxes(tmp_path / "s", tiny_model, ranks, mode="secagg")
    assert (boxes.refusals, listener.warnings, listener.repeated) == ([], [], [])
    terms, record = listener.records[1].ranks, listener.records[1].confidentiality
    assert terms is not None and terms.alike is alike
    assert record is not None and record.limit is not None and record.bits is not None
    (summed,) = (each.change for each in boxes.added if each.round == 1)
    by_rows, by_number = mean_by_column(opened, 1), mean_by_column(by_clinic(opened), 1)
    expected, other = (by_number, by_rows) if alike else (by_rows, by_number)
    step, found = 2 * record.limit / (2**record.bits - 1), named(summed)
    for at in range(8):
        trained = [clinic for clinic, rank in enumerate(ranks) if rank > at]
        weight = len(trained) if alike else sum(rows_of(clinic) for clinic in trained)
        bound = len(ranks) * step / weight + 1e-6
        assert all(
            float((found[name][:, at] - values[:, at]).abs().max()) <= bound
            for name, values in expected.items()
        )
        # Counted the other way, this column would be another one.
        apart = max(float((found[name][:, at] - other[name][:, at]).abs().max()) for name in found)
        assert apart > 2 * bound


@pytest.mark.parametrize("training", [SGD, ADAMW], ids=["sgd", "adamw"])
def test_where_clinics_count_alike_the_first_sum_is_as_fine_as_that_by_rows(
    training: dict[str, Any], tmp_path: Path, tiny_model: Path
) -> None:
    opened, _ = run_boxes(tmp_path / "o", tiny_model, HIGH, training=training)
    boxes, listener = run_boxes(tmp_path / "s", tiny_model, HIGH, mode="secagg", training=training)
    record = listener.records[1].confidentiality
    assert record is not None and record.clipped == 0
    (summed,) = (each.change for each in boxes.added if each.round == 1)
    expected, found = mean_by_column(by_clinic(opened), 1), named(summed)
    apart = sum(float((found[name] - values).square().sum()) for name, values in expected.items())
    size = sum(float(values.square().sum()) for values in expected.values())
    assert apart < 0.02**2 * size


def columns_beyond(state: AdapterState, rank: int) -> torch.Tensor:
    return torch.cat([values[:, rank:].reshape(-1) for values in named(state).values()])


def test_a_lone_clinic_of_a_high_rank_is_lowered_so_that_the_sum_hides_it(
    tmp_path: Path, tiny_model: Path
) -> None:
    boxes, listener = run_boxes(tmp_path / "f", tiny_model, LONE, mode="secagg")
    assert (boxes.refusals, listener.repeated) == ([], [])
    (warning,) = listener.warnings
    assert "trained at c1 than could be, as too few clinics have so high a rank" in warning
    assert [each.round for each in boxes.added] == [1, 2]
    for each in boxes.added:
        assert each.change.norm() > 0
        assert not columns_beyond(each.change, 2).any()
    for record in listener.records[1:]:
        assert record.participants == ("c0", "c1", "c2", "c3")
    # Nothing of a product is beyond rank 2 after the rounds that only two columns took part in.
    for b, a in pairs(adapter_after(boxes.simulation, 1)):
        assert torch.linalg.matrix_rank(b.double() @ a.double(), rtol=1e-5) == 2


class Breaking(Listener):
    """Takes a clinic's training file away after the base model was measured."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self._file = file

    def round_finished(self, record: RoundRecord) -> None:
        super().round_finished(record)
        self._file.unlink(missing_ok=True)


def test_a_clinic_that_keeps_failing_does_not_keep_the_others_from_a_sum(
    tmp_path: Path, tiny_model: Path
) -> None:
    counts = {"count": 1, "minimum_clinics": 4}
    plan = federation(
        tmp_path / "f", tiny_model, "alternating", mode="secagg", ranks=HALVES, rounds=counts
    )
    boxes = Boxes(plan)
    listener = Breaking(boxes.clinics[-1].data.train)
    boxes.run(listener)
    (repeated,) = listener.repeated
    assert "c5: bad-data" in repeated
    record = listener.records[-1]
    assert record.participants == ("c0", "c1", "c2", "c3", "c4")
    # Of the two that are left at rank 2 no weights are summed.
    assert record.ranks is not None and record.ranks.alike


def test_columns_that_nobody_trains_stay_as_they_were(tmp_path: Path, tiny_model: Path) -> None:
    boxes, _ = run_boxes(tmp_path / "f", tiny_model, LONE, "ffa", mode="secagg")
    start, end = (adapter_after(boxes.simulation, number) for number in (0, 2))
    assert columns_beyond(end, 2).equal(columns_beyond(start, 2))
    assert not end.part("B", 2).values.equal(start.part("B", 2).values)


class Careless(RankPlan):
    """A server that lets every clinic train what it can, whoever sums with it."""

    alike = False

    def __init__(self, rule: RankRule, rank: int, *, hidden: bool) -> None:
        super().__init__(rule, rank, hidden=False)

    def terms(self, clinics: Collection[str]) -> RankTerms | None:
        terms = super().terms(clinics)
        return terms and terms.model_copy(update={"alike": self.alike})


class CarelessOfUpdates(Careless):
    """One that hides rows, but not what a lone clinic trained."""

    alike = True


def lone_plan(folder: Path, model: Path, minimum: int, ranks: tuple[int, ...] = LONE) -> Simulation:
    return federation(
        folder,
        model,
        mode="secagg",
        ranks=ranks,
        rounds={"count": 1, "minimum_clinics": minimum},
    )


@pytest.mark.parametrize("ranks", [LONE, HIGH])
def test_a_server_that_would_uncover_a_lone_clinics_rows_is_refused_by_all(
    ranks: tuple[int, ...], tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fedpeft_server.rounds.loop, "RankPlan", Careless)
    boxes, listener = Boxes(lone_plan(tmp_path / "f", tiny_model, 3, ranks)), Listener()
    with pytest.raises(FederationError, match=r"round 1 failed 2 times.*c0: too-few-clinics"):
        boxes.run(listener)
    assert set(boxes.refusals) == {(f"c{at}", "too-few-clinics") for at in range(4)}
    assert boxes.added == []
    assert [record.round for record in listener.records] == [0]


@pytest.mark.parametrize("minimum", [3, 4])
def test_a_server_that_would_uncover_a_lone_clinic_gets_nothing_of_it(
    minimum: int, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fedpeft_server.rounds.loop, "RankPlan", CarelessOfUpdates)
    boxes, listener = Boxes(lone_plan(tmp_path / "f", tiny_model, minimum)), Listener()
    if minimum == 4:
        with pytest.raises(FederationError, match=r"round 1 failed 2 times.*c1: too-few-clinics"):
            boxes.run(listener)
        assert set(boxes.refusals) == {("c1", "too-few-clinics")}
        assert boxes.added == []
        assert [record.round for record in listener.records] == [0]
        return
    boxes.run(listener)
    assert boxes.refusals == [("c1", "too-few-clinics")]
    (record,) = listener.records[1:]
    assert record.participants == ("c0", "c2", "c3")
    assert [(each.clinic, each.reason) for each in record.failed] == [("c1", "too-few-clinics")]
    (summed,) = boxes.added
    assert summed.weight == rows_of(0) + rows_of(2) + rows_of(3)
    assert not columns_beyond(summed.change, 2).any()


def test_under_flexlora_a_clinic_sends_tensors_of_its_own_rank(
    tmp_path: Path, tiny_model: Path
) -> None:
    ranks = (8, 8, 2, 2)
    boxes, listener = run_boxes(tmp_path / "f", tiny_model, ranks, "flexlora")
    assert (boxes.refusals, listener.warnings, listener.repeated) == ([], [], [])
    for number in (1, 2):
        added = [each for each in boxes.added if each.round == number]
        sent = {each.weight: each.change.schema for each in added}
        assert {rows: schema.rank for rows, schema in sent.items()} == {
            rows_of(at): rank for at, rank in enumerate(ranks)
        }
        assert {schema.factors for schema in sent.values()} == {"AB"}
        # The mean of the products of all, each the first columns of the start plus its change.
        start, after = (adapter_after(boxes.simulation, at) for at in (number - 1, number))
        for module in range(len(list(pairs(start)))):
            mean = mean_product(start, added, module)
            left, values, right = torch.linalg.svd(mean, full_matrices=False)
            cut = left[:, :8] * values[:8] @ right[:8]
            b, a = list(pairs(after))[module]
            assert float((b.double() @ a.double() - cut).norm()) < 1e-5 * float(mean.norm())


def mean_product(start: AdapterState, added: list[Added], module: int) -> torch.Tensor:
    """The dense mean product of one module, by rows."""
    total = torch.zeros(())
    for each in added:
        rank = each.change.schema.rank
        (b, a), (db, da) = (list(pairs(state))[module] for state in (start, each.change))
        moved = (b[:, :rank] + db).double() @ (a[:rank] + da).double()
        total = total + each.weight * moved
    return total / sum(each.weight for each in added)
