"""What ``fedpeft-client ledger`` tells people and programs."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedpeft.privacy.accounting import epsilon_of
from fedpeft.privacy.charge import Charge
from fedpeft.privacy.ledger import Law, Ledger, RoundEntry
from fedpeft_client.reports.ledger_view import ledger_reports, report_json, report_lines

STEP = Charge(noise="gaussian", sampling_rate=0.02, noise_multiplier=1.0)
DELTA = 1e-5
EPSILON = {steps: epsilon_of({STEP: steps}, DELTA).epsilon for steps in (10, 20, 30, 55)}
LAW = Law(max_epsilon=EPSILON[55], delta=DELTA)
FIRST = RoundEntry(federation="heart", run="run-1", round=1, unit="patient")
SECOND = RoundEntry(federation="lung", run="run-2", round=1, unit="record")


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    """Return a ledger in which two runs have charged 10 steps each to 20 patients."""
    with Ledger(tmp_path / "ledger.db") as opened:
        charge(opened, FIRST, STEP, 10)
        charge(opened, SECOND, STEP, 10)
        yield opened


def charge(ledger: Ledger, entry: RoundEntry, step: Charge, steps: int) -> None:
    dataset = ledger.dataset(f"patient-{number}" for number in range(20)).id
    budget = ledger.open_round(dataset, entry, step, steps, Law(delta=DELTA))
    for number in range(steps):
        budget.charge(number)


def lines(ledger: Ledger, law: Law) -> dict[str, str]:
    told = report_lines(ledger_reports(ledger, law))
    return dict(line.split("\t") for line in told)


def only_dataset(ledger: Ledger, law: Law) -> dict[str, Any]:
    content = json.loads(json.dumps(report_json(ledger_reports(ledger, law)), allow_nan=False))
    assert content["schema"] == 1
    (dataset,) = content["datasets"]
    return dataset


def test_people_see_what_is_spent_and_left(ledger: Ledger) -> None:
    told = lines(ledger, LAW)
    assert told["data set 1"].startswith("20 units, first seen 2")
    assert told["data set 1"].endswith("each record protected")
    epsilon = float(told["spent"].split()[1])
    assert EPSILON[20] <= epsilon <= EPSILON[20] + 0.001
    assert "by PLD" in told["spent"]
    assert "by RDP" in told["spent"]
    assert told["left"].endswith(f"of max_epsilon = {EPSILON[55]:g}")
    assert "lung/run-2" in told["job"]
    assert "1 round, 10 steps" in told["job"]


def test_one_more_round_is_priced_like_the_last_one(ledger: Ledger) -> None:
    assert "(run-2, 10 steps) would cost epsilon" in lines(ledger, LAW)["one more"]
    assert lines(ledger, LAW)["one more"].endswith("3 such rounds still fit")
    following = only_dataset(ledger, LAW)["next_round"]
    assert following["total"] == pytest.approx(EPSILON[30])
    assert following["epsilon"] == pytest.approx(EPSILON[30] - EPSILON[20])
    assert following["rounds_left"] == 3


def test_programs_see_every_job(ledger: Ledger) -> None:
    dataset = only_dataset(ledger, LAW)
    assert (dataset["units"], dataset["unit"], dataset["private"]) == (20, "record", True)
    assert dataset["epsilon"] == pytest.approx(EPSILON[20])
    assert dataset["left"] == pytest.approx(EPSILON[55] - EPSILON[20])
    assert [(job["run"], job["unit"], job["steps"]) for job in dataset["jobs"]] == [
        ("run-1", "patient", 10),
        ("run-2", "record", 10),
    ]
    assert dataset["jobs"][0]["epsilon"] == pytest.approx(EPSILON[10])


def test_training_without_noise_has_no_bound(ledger: Ledger) -> None:
    charge(ledger, FIRST, Charge(noise="none"), 1)
    told = lines(ledger, LAW)
    assert told["spent"] == "no bound (trained without noise)"
    assert told["left"].endswith("cannot be kept any more")
    assert told["one more"].endswith("has no bound (trained without noise)")
    dataset = only_dataset(ledger, LAW)
    assert (dataset["private"], dataset["epsilon"], dataset["left"]) == (False, None, None)
    assert [job["private"] for job in dataset["jobs"]] == [False, True]
    assert dataset["next_round"]["rounds_left"] == 0


def test_without_a_bound_nothing_is_left_or_refused(ledger: Ledger) -> None:
    unbound = Law(delta=DELTA)
    assert lines(ledger, unbound)["left"] == "no max_epsilon is set, so no round is refused"
    assert "still fit" not in lines(ledger, unbound)["one more"]
    dataset = only_dataset(ledger, unbound)
    assert (dataset["max_epsilon"], dataset["left"]) == (None, None)
    assert dataset["next_round"]["rounds_left"] is None


def test_a_ledger_without_charges_says_so(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.db") as ledger:
        assert report_lines(ledger_reports(ledger, LAW)) == ["ledger\tnothing was charged yet"]
        ledger.dataset(["patient-1"])
        dataset = only_dataset(ledger, LAW)
        assert (dataset["epsilon"], dataset["jobs"], dataset["next_round"]) == (0, [], None)
        assert lines(ledger, LAW)["spent"].startswith("epsilon 0.000 at delta 1e-05")


def test_no_patient_is_named(ledger: Ledger) -> None:
    reports = ledger_reports(ledger, LAW)
    assert "patient-" not in "\n".join(report_lines(reports)) + json.dumps(report_json(reports))
