"""Honest runs of a secure sum: whoever leaves when, the rest is summed exactly or not at all."""

import math
import re
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedpeft.config import Adversary
from fedpeft.errors import OutOfOrder, TooFewClinics, WeakThreshold
from fedpeft.secagg import STAGES, State
from fedpeft.secagg.threshold import floor_of, require_safe, threshold_of

_ACTIVE = (3, 3, 4, 5, 5, 6, 7, 7, 8, 9, 9, 10, 11, 11, 12, 13, 13, 14)
_CURIOUS = (3, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 9, 10, 10, 11)
FLOORS: dict[Adversary, dict[int, int]] = {
    "active": dict(zip(range(3, 21), _ACTIVE, strict=True)),
    "curious": dict(zip(range(3, 21), _CURIOUS, strict=True)),
}


@dataclass(frozen=True)
class Plan:
    """Who leaves at which stage, and whether its last answer is made and lost on the way."""

    clinics: int
    adversary: Adversary
    leaving: dict[int, tuple[str, bool]]

    def at(self, stage: str, *, answered: bool) -> set[str]:
        return {f"c{at:03d}" for at, how in self.leaving.items() if how == (stage, answered)}

    def gone(self, *stages: str) -> set[str]:
        return {f"c{at:03d}" for at, (stage, _) in self.leaving.items() if stage in stages}


@st.composite
def plans(draw: st.DrawFn, *, least: int = 3, most: int = 20) -> Plan:
    """Draw a pattern of dropouts that leaves as many clinics as the threshold demands."""
    clinics = draw(st.integers(least, most))
    adversary: Adversary = draw(st.sampled_from(["active", "curious"]))
    sharing = draw(st.integers(3, clinics))
    spare = sharing - FLOORS[adversary][sharing]
    before = [("keys", draw(st.booleans())) for _ in range(clinics - sharing)]
    later = draw(st.lists(st.tuples(st.sampled_from(STAGES[1:]), st.booleans()), max_size=spare))
    who = draw(st.permutations(range(clinics)))
    leaving = dict(zip(who, before + later, strict=False))
    return Plan(clinics, adversary, leaving)


def carried(world, plan: Plan):
    """Run all stages as planned and return the result."""
    absent: set[str] = set()
    for stage in STAGES:
        absent |= plan.at(stage, answered=False)
        lost = plan.at(stage, answered=True)
        world.step(absent=absent, lost=lost)
        absent |= lost
    return world.server.result


def plain_sum(world, names: list[str]) -> NDArray[np.uint64]:
    """Add the words of the clinics' vectors without masks, in 64 bits."""
    words = np.array([world.updates[name].words() for name in names], np.uint64)
    return np.add.reduce(words)


def assert_is_the_sum_of(world, result, names: list[str]):
    bits, coordinates = world.quantiser.bits, world.terms.coordinates
    sums = plain_sum(world, names)
    levels = sums[:coordinates].astype(np.float64) - len(names) * world.quantiser.centre
    limbs = sums[coordinates:].reshape(len(world.terms.integers), -1)
    integers = [sum(int(limb) << bits * at for at, limb in enumerate(row)) for row in limbs]

    assert list(result.survivors) == names
    assert np.array_equal(result.coordinates, levels * world.quantiser.step)
    assert list(result.integers.values()) == integers


@settings(max_examples=120, deadline=None)
@given(plan=plans())
def test_the_result_is_the_plain_sum_of_the_survivors_words_bit_for_bit(make_world, plan: Plan):
    world = make_world(plan.clinics, adversary=plan.adversary)
    gone = plan.gone("keys", "shares", "masked")

    result = carried(world, plan)

    assert_is_the_sum_of(world, result, [name for name in world.names if name not in gone])


@settings(max_examples=30, deadline=None)
@given(plan=plans(most=12))
def test_the_float_mean_is_right_to_a_step_and_integers_are_exact(make_world, plan: Plan):
    world = make_world(plan.clinics, adversary=plan.adversary, coordinates=50)
    result = carried(world, plan)
    updates = [world.updates[name] for name in result.survivors]
    weight = sum(update.integers["weight"] for update in updates)
    exact = sum(u.integers["weight"] * u.values.astype(np.float64) for u in updates)

    error = np.abs(result.coordinates - exact).max()

    assert error <= len(updates) * world.quantiser.step
    assert error / weight <= len(updates) * world.quantiser.step / weight
    assert result.integers["weight"] == weight
    assert result.integers["loss"] == sum(update.integers["loss"] for update in updates)
    assert result.integers["clipped"] == 0


def test_each_word_below_the_masks_is_a_neighbouring_level_of_the_value(make_world):
    world = make_world(4, coordinates=2000)
    world.run()
    for update in world.updates.values():
        levels = update.values.astype(np.float64) * update.integers["weight"]
        levels = levels / world.quantiser.step + world.quantiser.centre
        words = update.words()[: levels.size].astype(np.float64)
        assert np.abs(words - levels).max() < 1


def test_clipped_coordinates_of_all_clinics_are_counted_in_the_sum(make_world):
    values = [np.array([1e9, -1e9, 0, 0], np.float32) for _ in range(3)]
    world = make_world(3, values=values)
    result = world.run()
    assert result.integers["clipped"] == 6
    assert result.coordinates == pytest.approx([120, -120, 0, 0])


@pytest.mark.parametrize("clinics", [3, 20])
@pytest.mark.parametrize("bits", [2, 16, 24])
def test_the_width_is_just_the_headroom_of_the_clinics(make_world, clinics: int, bits: int):
    result = make_world(clinics, bits=bits).run()
    assert result.width == math.ceil(math.log2(clinics * (2**bits - 1) + 1))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("answered", [False, True])
@pytest.mark.parametrize("place", [0, 3, 6])
def test_a_dropout_at_each_stage_of_each_place_leaves_the_sum(
    make_world, stage: str, answered: bool, place: int
):
    plan = Plan(7, "active", {place: (stage, answered)})
    world = make_world(7)
    gone = plan.gone("keys", "shares", "masked")
    assert_is_the_sum_of(world, carried(world, plan), [it for it in world.names if it not in gone])


def test_a_clinic_that_falls_silent_at_the_check_may_still_unmask_nothing(make_world):
    world = make_world(7)
    world.until("check")
    world.step(absent={"c006"})
    request = world.server.requests()["c006"]
    with pytest.raises(OutOfOrder):
        world.clinics["c006"].receive("unmask", request)
    world.step(absent={"c006"})
    assert_is_the_sum_of(world, world.server.result, world.names)


# beyond the threshold


@st.composite
def too_many(draw: st.DrawFn) -> tuple[int, Adversary, str, list[int], bool]:
    clinics = draw(st.integers(3, 14))
    adversary: Adversary = draw(st.sampled_from(["active", "curious"]))
    stage = draw(st.sampled_from(STAGES))
    left = 2 if stage == "keys" else FLOORS[adversary][clinics] - 1
    leaving = draw(st.permutations(range(clinics)))[: clinics - draw(st.integers(0, left))]
    return clinics, adversary, stage, leaving, draw(st.booleans())


@settings(max_examples=40, deadline=None)
@given(case=too_many())
def test_beyond_the_threshold_the_sum_ends_at_that_stage_and_opens_nothing(make_world, case):
    clinics, adversary, stage, leaving, answered = case
    world = make_world(clinics, adversary=adversary)
    world.until(stage)
    names = {f"c{at:03d}" for at in leaving}

    with pytest.raises(TooFewClinics):
        world.step(**{"lost" if answered else "absent": names})

    with pytest.raises(OutOfOrder):
        _ = world.server.result
    with pytest.raises(OutOfOrder):
        world.server.close()
    assert world.server._accumulator.size == 0
    assert not world.server._opened
    assert world.server.requests() == {}
    assert_nothing_opens(world, FLOORS[adversary][clinics])


def assert_nothing_opens(world, threshold: int):
    """Even a server that kept every byte holds no secret, and too few shares of each."""
    wire = b"\xff".join(data for stage in world.answers.values() for data in stage.values())
    for kept in world.secrets.values():
        for secret in (kept.self_seed, kept.mask_key.private, kept.share_key.private):
            assert secret not in wire
    assert len(world.answers["unmask"]) < threshold


@pytest.mark.parametrize("stage", STAGES[1:])
def test_exactly_the_threshold_is_enough_at_each_stage(make_world, stage: str):
    world = make_world(10)
    world.until(stage)
    absent = set(world.names[-3:])
    world.step(absent=absent)
    while world.server.stage != "done":
        world.step(absent=absent)
    assert len(world.server.result.survivors) == (7 if stage in ("shares", "masked") else 10)


def test_a_sum_of_fewer_than_the_minimum_of_clinics_is_not_made(make_world):
    world = make_world(9, minimum=8)
    world.until("masked")
    with pytest.raises(TooFewClinics, match="7 clinics"):
        world.step(absent={"c000", "c001"})


@pytest.mark.parametrize("stage", ["check", "unmask"])
def test_the_minimum_counts_summands_not_those_who_stay_to_open_the_sum(make_world, stage: str):
    world = make_world(9, minimum=9)
    world.until(stage)
    world.step(absent={"c000", "c001"})
    while world.server.stage != "done":
        world.step(absent={"c000", "c001"})
    assert_is_the_sum_of(world, world.server.result, world.names)


def test_after_the_sum_both_sides_hold_no_secret(make_world):
    world = make_world(4)
    world.run()
    assert all(it.state is State.UNMASKED for it in world.clinics.values())
    assert all(it._secrets is None and it._contribution is None for it in world.clinics.values())
    assert not world.server._opened
    assert not world.server._shared


def test_the_server_keeps_one_vector_however_many_clinics_there_are(make_world):
    world = make_world(6, coordinates=1000)
    world.until("check")
    kept = [it for it in vars(world.server).values() if isinstance(it, np.ndarray)]
    assert [it.size for it in kept] == [1000 + 3 * 4]


# sessions


def secrets_of(world) -> list[bytes]:
    """Return all that must differ between sessions: keys, seeds, shares, boxes, masks' seeds."""
    found: list[bytes] = []
    for name, kept in world.secrets.items():
        update = world.updates[name]
        found += [kept.self_seed, kept.share_key.private, kept.mask_key.private]
        found += [kept.share_key.public, kept.mask_key.public]
        found += [share for pair in kept.shares.values() for share in pair]
        data = world.answers["shares"][name]
        found += [data[at : at + 82] for at in range(32, len(data), 82)]
        found += [seed for seed in (*update.add, *update.subtract) if seed != kept.self_seed]
    return found


@pytest.mark.parametrize("changes", [{}, {"attempt": 2}, {"round": 4}])
def test_the_next_session_shares_no_key_seed_or_share_with_the_last(
    make_world, make_session, changes
):
    first = make_world(5)
    first.until("check")
    second = make_world(5, identities=first.identities, session=make_session(**changes))
    second.run()
    assert len(secrets_of(first)) > 5 * 17
    assert set(secrets_of(first)).isdisjoint(secrets_of(second))


def test_within_a_session_a_mask_seed_belongs_to_one_pair_or_one_clinic(make_world):
    world = make_world(6)
    world.until("check")
    holders: dict[bytes, list[str]] = defaultdict(list)
    for name, update in world.updates.items():
        for seed in (*update.add, *update.subtract):
            holders[seed].append(name)
    assert sorted(map(len, holders.values())) == [1] * 6 + [2] * 15


@pytest.mark.parametrize(
    "changes",
    [
        {"federation": "south"},
        {"run": 8},
        {"round": 4},
        {"attempt": 2},
        {"kind": "evaluate"},
        {"model": b"n" * 32},
        {"federation": "north\x00", "run": 7},
    ],
)
def test_every_field_of_the_session_is_in_its_digest(make_session, changes):
    assert make_session(**changes).digest != make_session().digest


# thresholds


@pytest.mark.parametrize("adversary", ["active", "curious"])
@pytest.mark.parametrize("clinics", range(3, 21))
def test_the_floor_of_the_threshold_is_that_of_the_table(clinics: int, adversary: Adversary):
    assert floor_of(clinics, adversary) == FLOORS[adversary][clinics]


@pytest.mark.parametrize("clinics", range(3, 101))
def test_the_floor_leaves_more_common_clinics_than_the_server_may_control(clinics: int):
    assert 2 * floor_of(clinics, "active") - clinics > (clinics - 1) // 3
    assert 2 * floor_of(clinics, "curious") - clinics > 0


@pytest.mark.parametrize("asked", [None, 1, 5, 7])
def test_a_threshold_below_the_floor_is_raised_to_it(asked: int | None):
    assert threshold_of(10, "active", asked) == 7


def test_a_threshold_above_the_floor_is_kept(make_world):
    world = make_world(6, threshold=6)
    world.until("masked")
    with pytest.raises(TooFewClinics, match="5 clinics"):
        world.step(absent={"c003"})


def test_a_threshold_that_cannot_be_reached_is_too_few_clinics(make_world):
    with pytest.raises(TooFewClinics, match="8 clinics answered where 9 were asked to stay"):
        make_world(8, threshold=9).step()


@pytest.mark.parametrize("clinics", [0, 1, 2])
@pytest.mark.parametrize("asked", [None, 5])
def test_below_the_least_sum_nobody_is_told_to_lower_the_threshold(clinics: int, asked: int | None):
    with pytest.raises(TooFewClinics, match="needs at least 3: mend what the others") as caught:
        threshold_of(clinics, "active", asked)
    assert "aggregation.threshold" not in str(caught.value)


@pytest.mark.parametrize(("clinics", "asked"), [(3, 4), (8, 9), (8, 100)])
def test_the_threshold_that_is_advised_can_be_had(clinics: int, asked: int):
    with pytest.raises(TooFewClinics) as caught:
        threshold_of(clinics, "active", asked)
    found = re.search(r"no more than (\d+) in aggregation\.threshold", str(caught.value))
    assert found is not None
    assert threshold_of(clinics, "active", int(found[1])) <= clinics


def test_a_clinic_accepts_the_floor_and_no_less():
    require_safe(7, 10, "active")
    with pytest.raises(WeakThreshold):
        require_safe(6, 10, "active")
