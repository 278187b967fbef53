"""Membership figures against counting by hand."""

import numpy as np
import pytest

from fedpeft.audit.membership import measure


def draw_case(seed: int, *, ties: bool) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    member = draw.random(150) < 0.5
    scores = draw.normal(size=150) + 0.8 * member
    return np.asarray(np.round(scores, 1) if ties else scores, np.float64), member


def alone(records: int) -> np.ndarray:
    """Every record is a patient of its own."""
    return np.arange(records)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_the_area_is_the_share_of_pairs_in_order(seed: int, ties: bool):
    scores, member = draw_case(seed, ties=ties)
    pairs = [
        1.0 if inside > outside else 0.5 if inside == outside else 0.0
        for inside in scores[member]
        for outside in scores[~member]
    ]
    found = measure(scores, member, alone(150))
    assert found.auc == pytest.approx(np.mean(pairs), abs=1e-12)
    x, y = np.array(found.roc).T
    assert np.trapezoid(y, x) == pytest.approx(found.auc, abs=1e-9)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_the_rate_at_few_false_alarms_is_the_best_of_all_thresholds(seed: int, ties: bool):
    draw = np.random.default_rng(seed)
    member = np.arange(600) < 300
    scores = draw.normal(size=600) + 2.0 * member
    scores = np.asarray(np.round(scores, 1) if ties else scores, np.float64)
    rates = [
        (scores[member] >= threshold).mean()
        for threshold in np.append(scores, np.inf)
        if (scores[~member] >= threshold).mean() <= 0.01
    ]
    assert measure(scores, member, alone(600)).tpr == pytest.approx(max(rates))


def test_perfect_and_useless_scores():
    member = np.arange(40) < 20
    assert measure(member.astype(np.float64), member, alone(40)).auc == 1.0
    assert measure(member.astype(np.float64), member, alone(40)).tpr == 1.0
    assert measure(np.ones(40), member, alone(40)).auc == 0.5
    assert measure(np.ones(40), member, alone(40)).tpr == 0.0
    assert measure(-member.astype(np.float64), member, alone(40)).auc == 0.0


def test_the_interval_holds_the_truth_in_about_95_percent_of_cases():
    hits = 0
    for seed in range(300):
        draw = np.random.default_rng(seed)
        member = np.arange(120) < 60
        scores = draw.normal(size=120) + member
        low, high = measure(scores, member, alone(120)).interval
        hits += low <= 0.7602 <= high  # Φ(1/√2)
    assert 0.91 <= hits / 300 <= 0.99


def test_records_of_one_patient_count_for_less():
    scores, member = draw_case(0, ties=False)
    copied, of_patient = np.repeat(scores, 4), np.repeat(np.arange(150), 4)
    once = measure(scores, member, alone(150)).interval
    four = measure(copied, np.repeat(member, 4), of_patient).interval
    assert four == pytest.approx(once)


def test_one_patient_on_a_side_leaves_everything_open():
    member = np.array([True, True, False, False])
    found = measure(np.array([3.0, 2.0, 1.0, 0.0]), member, np.array([0, 0, 1, 2]))
    assert found.interval == (0.0, 1.0)


def test_the_curve_runs_from_corner_to_corner():
    scores, member = draw_case(2, ties=True)
    roc = measure(scores, member, alone(150)).roc
    assert (roc[0], roc[-1]) == ((0.0, 0.0), (1.0, 1.0))
    assert list(roc) == sorted(roc)
