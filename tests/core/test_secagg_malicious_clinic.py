"""A malicious clinic against the server: what it sends wrong is refused, and the round goes on."""

import copy
import secrets
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.errors import (
    AggregationRefused,
    BadShare,
    BadVector,
    FedpeftError,
    InconsistentLists,
    OtherModelSent,
    OutOfOrder,
    SealingError,
    TooFewClinics,
    WrongSignature,
)
from fedpeft.secagg import STAGES
from fedpeft.secagg.messages import Advert, advert_statement
from fedpeft.secagg.pairwise import EphemeralKey
from fedpeft.secagg.shamir import PRIME

BAD = "c002"
HONEST = ["c000", "c001", "c003", "c004"]


def remembered(server) -> dict[str, Any]:
    """Return a copy of all that the server holds."""
    kept = vars(server).items()
    return {
        key: copy.copy(it) if isinstance(it, dict | set | np.ndarray) else it for key, it in kept
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]):
    assert before.keys() == after.keys()
    for key, value in before.items():
        if isinstance(value, np.ndarray):
            assert np.array_equal(value, after[key])
        else:
            assert value is after[key] or value == after[key]


def assert_refused(server, name: str, data: bytes, error: type[FedpeftError]):
    """The answer is refused with exactly this error and has changed nothing."""
    before = remembered(server)
    with pytest.raises(FedpeftError) as caught:
        server.receive(name, data)
    assert type(caught.value) is error
    assert_same(before, vars(server))


def assert_goes_on_without(world, error: type[FedpeftError], data: bytes, *, counted: bool = False):
    """The round ends with the exact sum of the others, or of all if the vector had come."""
    world.server.requests()
    assert_refused(world.server, BAD, data, error)
    while world.server.stage != "done":
        world.step(absent={BAD})
    result = world.server.result
    survivors = sorted([*HONEST, BAD]) if counted else HONEST
    assert list(result.survivors) == survivors
    weights = [world.updates[name].integers["weight"] for name in survivors]
    assert result.integers["weight"] == sum(weights)


def advert_of(world, name: str, *, session=None, **keys: bytes) -> Advert:
    """Return keys as the clinic ``name`` would sign them."""
    session = session or world.session
    share_key = keys.get("share_key", EphemeralKey.generate().public)
    mask_key = keys.get("mask_key", EphemeralKey.generate().public)
    statement = advert_statement(session, name, share_key, mask_key)
    signature = world.identities[name].sign(statement)
    return Advert(session.hint, share_key, mask_key, signature)


# keys


def test_keys_with_a_wrong_signature_are_refused(make_world):
    world = make_world(5)
    data = advert_of(world, "c003").to_bytes()
    assert_goes_on_without(world, WrongSignature, data)


@pytest.mark.parametrize("change", [{"round": 4}, {"attempt": 2}, {"model": b"n" * 32}])
def test_keys_for_another_session_are_refused(make_world, make_session, change):
    world = make_world(5)
    data = advert_of(world, BAD, session=make_session(**change)).to_bytes()
    assert_goes_on_without(world, OtherModelSent, data)


@pytest.mark.parametrize("which", ["share_key", "mask_key"])
def test_a_key_of_small_order_is_refused_before_it_reaches_the_others(make_world, which: str):
    """Each of the others would leave the round on seeing it, so one clinic could stop it."""
    world = make_world(5)
    data = advert_of(world, BAD, **{which: bytes(32)}).to_bytes()
    assert_goes_on_without(world, BadShare, data)


@pytest.mark.parametrize("which", ["share_key", "mask_key"])
@pytest.mark.parametrize("taken", ["share_key", "mask_key"])
def test_a_key_of_another_clinic_is_refused_before_it_reaches_the_others(
    make_world, which: str, taken: str
):
    world = make_world(5)
    theirs = world.clinics["c000"].receive("keys", b"")
    world.server.receive("c000", theirs)
    key = getattr(Advert.from_bytes(theirs), taken)
    assert_refused(
        world.server, BAD, advert_of(world, BAD, **{which: key}).to_bytes(), InconsistentLists
    )


def test_one_key_for_both_purposes_is_refused(make_world):
    world = make_world(5)
    key = EphemeralKey.generate().public
    data = advert_of(world, BAD, share_key=key, mask_key=key).to_bytes()
    assert_goes_on_without(world, InconsistentLists, data)


def test_an_ed25519_identity_of_another_as_an_x25519_key_does_not_stop_the_round(make_world):
    world = make_world(5)
    data = advert_of(world, BAD, mask_key=world.pinned["c000"]).to_bytes()
    for name in HONEST:
        world.server.receive(name, world.clinics[name].receive("keys", b""))
    world.server.receive(BAD, data)
    world.server.close()
    while world.server.stage != "done":
        world.step(absent={BAD})
    assert list(world.server.result.survivors) == HONEST


# lengths and contents


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("damage", ["empty", "short", "long"])
def test_an_answer_of_the_wrong_length_is_refused(make_world, stage: str, damage: str):
    world = make_world(5)
    request = world.until(stage)[BAD]
    answer = world.clinics[BAD].receive(stage, request)
    data = {"empty": b"", "short": answer[:-1], "long": answer + b"\x00"}[damage]
    error = {"masked": BadVector, "check": WrongSignature}.get(stage, AggregationRefused)
    assert_goes_on_without(world, error, data, counted=stage in ("check", "unmask"))


def test_a_vector_with_something_in_its_padding_is_refused(make_world):
    world = make_world(5)
    answer = world.clinics[BAD].receive("masked", world.until("masked")[BAD])
    assert_goes_on_without(world, BadVector, b"\xff" * len(answer))


def test_a_signature_of_another_clinic_is_refused(make_world):
    world = make_world(5)
    theirs = world.clinics["c000"].receive("check", world.until("check")["c000"])
    assert_refused(world.server, BAD, theirs, WrongSignature)


def test_a_vector_of_noise_is_noticed_and_no_sum_is_made(make_world):
    world = make_world(5, coordinates=404)
    for name, request in world.until("masked").items():
        answer = world.clinics[name].receive("masked", request)
        world.server.receive(name, secrets.token_bytes(len(answer)) if name == BAD else answer)
    world.server.close()
    with pytest.raises(BadVector, match="masks are left"):
        world.run()
    with pytest.raises(OutOfOrder):
        _ = world.server.result


# order


@pytest.mark.parametrize("stage", STAGES)
def test_a_second_answer_is_refused(make_world, stage: str):
    world = make_world(5)
    answer = world.clinics[BAD].receive(stage, world.until(stage)[BAD])
    world.server.receive(BAD, answer)
    assert_refused(world.server, BAD, answer, OutOfOrder)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", ["c099", "", "c0000"])
def test_an_answer_of_somebody_unknown_is_refused(make_world, stage: str, name: str):
    world = make_world(5)
    answer = world.clinics[BAD].receive(stage, world.until(stage)[BAD])
    assert_refused(world.server, name, answer, OutOfOrder)


@pytest.mark.parametrize(
    ("left_at", "stage"),
    [("keys", "shares"), ("shares", "masked"), ("masked", "check"), ("masked", "unmask")],
)
def test_an_answer_of_a_clinic_that_is_out_is_refused(make_world, left_at: str, stage: str):
    world = make_world(5)
    world.until(left_at)
    while world.server.stage != stage:
        world.step(absent={BAD})
    assert_refused(world.server, BAD, world.answers.get(left_at, {}).get(BAD, b""), OutOfOrder)


def test_after_the_end_every_answer_is_refused(make_world):
    world = make_world(5)
    world.run()
    assert_refused(world.server, BAD, b"", OutOfOrder)
    with pytest.raises(OutOfOrder):
        world.server.close()


# false secrets


def unmask(world, false: dict[str, bytes], silent: tuple[str, ...] = ()):
    """Carry the last stage; the clinics in ``false`` answer that byte over and over."""
    for name, request in world.until("unmask").items():
        if name not in silent:
            answer = world.clinics[name].receive("unmask", request)
            lie = (false[name] + bytes(32)) * (len(answer) // 33) if name in false else answer
            world.server.receive(name, lie)
    world.server.close()


@pytest.mark.parametrize("liar", range(5))
@pytest.mark.parametrize("lie", [b"\x00", b"\x01", b"\xff"])
def test_false_opened_shares_of_one_clinic_are_worked_around(make_world, liar: int, lie: bytes):
    world = make_world(5)
    unmask(world, {f"c{liar:03d}": lie})
    assert len(world.server.result.survivors) == 5
    weights = [update.integers["weight"] for update in world.updates.values()]
    assert world.server.result.integers["weight"] == sum(weights)


def test_false_shares_of_a_dropped_clinics_key_are_worked_around(make_world):
    world = make_world(9)
    world.until("masked")
    world.step(absent={"c008"})
    unmask(world, {"c000": b"\x00"})
    assert len(world.server.result.survivors) == 8


@pytest.mark.parametrize("lie", [b"\x00", b"\xff"])
def test_false_opened_shares_without_a_spare_are_refused_by_name(make_world, lie: bytes):
    world = make_world(5)
    with pytest.raises(BadShare, match="clinic c000"):
        unmask(world, {BAD: lie}, silent=("c004",))
    with pytest.raises(OutOfOrder):
        _ = world.server.result


def test_a_false_commitment_is_refused_by_name(make_world):
    world = make_world(5)
    for name, request in world.until("shares").items():
        answer = world.clinics[name].receive("shares", request)
        world.server.receive(name, bytes(32) + answer[32:] if name == BAD else answer)
    world.server.close()
    with pytest.raises(BadShare, match=f"clinic {BAD}"):
        world.run()


def test_one_false_share_costs_its_receiver_only(make_world):
    world = make_world(5)
    for name, request in world.until("shares").items():
        answer = world.clinics[name].receive("shares", request)
        world.server.receive(
            name, answer[:32] + bytes(82) + answer[114:] if name == BAD else answer
        )
    world.server.close()
    with pytest.raises(BadShare, match=f"share of clinic {BAD}"):
        world.clinics["c000"].receive("masked", world.server.requests()["c000"])
    while world.server.stage != "done":
        world.step(absent={"c000"})
    assert list(world.server.result.survivors) == ["c001", "c002", "c003", "c004"]


def test_a_clinic_that_shares_out_garbage_stops_the_round_and_opens_nothing(make_world):
    """What the specification says is not protected: the round, not the updates."""
    world = make_world(5)
    for name, request in world.until("shares").items():
        answer = world.clinics[name].receive("shares", request)
        world.server.receive(name, bytes(len(answer)) if name == BAD else answer)
    world.server.close()
    for name in HONEST:
        with pytest.raises(BadShare):
            world.clinics[name].receive("masked", world.server.requests()[name])
        assert world.clinics[name]._secrets is None
    with pytest.raises(TooFewClinics):
        world.server.close()


def test_a_share_that_is_no_field_element_is_worked_around(make_world):
    world = make_world(5)
    for name, request in world.until("unmask").items():
        answer = world.clinics[name].receive("unmask", request)
        false = PRIME.to_bytes(33, "big") * 5
        world.server.receive(name, false if name == BAD else answer)
    world.server.close()
    assert len(world.server.result.survivors) == 5


# damaged bytes


@cache
def at_stage(make_world, stage: str) -> tuple[Any, bytes]:
    world = make_world(4)
    request = world.until(stage)[BAD]
    return world.server, world.clinics[BAD].receive(stage, request)


@pytest.mark.parametrize("stage", STAGES)
@settings(max_examples=100, deadline=None)
@given(draw=st.data())
def test_damaged_answers_are_refused_by_name_and_change_nothing(
    make_world, stage: str, draw: st.DataObject
):
    honest, answer = at_stage(make_world, stage)
    server = copy.deepcopy(honest)
    at = draw.draw(st.integers(0, len(answer) - 1))
    flipped = answer[:at] + bytes([answer[at] ^ 1 << at % 8]) + answer[at + 1 :]
    longer = answer + draw.draw(st.binary(min_size=1, max_size=40))
    data = draw.draw(
        st.one_of(st.sampled_from([flipped, answer[:at], longer]), st.binary(max_size=600))
    )
    try:
        server.receive(BAD, data)
    except (AggregationRefused, SealingError):
        assert_same(vars(honest), vars(server))
    else:
        # Boxes, masked words and shares look like any other bytes of their length.
        assert stage in ("shares", "masked", "unmask")
        assert len(data) == len(answer)
