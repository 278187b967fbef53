"""A malicious server against real clinics, with requests out of order and damaged bytes."""

import copy
import struct
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.errors import (
    AggregationRefused,
    OutOfOrder,
    SealingError,
)
from fedpeft.secagg import STAGES, State
from fedpeft.secagg.messages import (
    Survivors,
    Unmasking,
)

VICTIM = "c001"


def request_of(world, name: str = VICTIM) -> Unmasking:
    return Unmasking.from_bytes(world.until("unmask")[name], len(world.names))


# order

BEFORE: dict[str, State] = dict(zip(STAGES, State, strict=False))
"""The state in which a clinic waits for each stage."""


@pytest.mark.parametrize("due", STAGES)
@pytest.mark.parametrize("asked", [*STAGES, "", "train", "KEYS"])
def test_a_request_out_of_order_changes_nothing(make_world, due: str, asked: str):
    if asked == due:
        return
    world = make_world(3)
    request = world.until(due)[VICTIM]
    clinic = world.clinics[VICTIM]
    before = dict(vars(clinic))
    for data in (b"", request):
        with pytest.raises(OutOfOrder):
            clinic.receive(asked, data)
    assert clinic.state is BEFORE[due]
    assert vars(clinic) == before
    assert len(world.run().survivors) == 3


@pytest.mark.parametrize("asked", STAGES)
def test_a_finished_session_answers_nothing(make_world, asked: str):
    world = make_world(3)
    world.run()
    with pytest.raises(OutOfOrder):
        world.clinics[VICTIM].receive(asked, b"")
    assert world.clinics[VICTIM].state is State.UNMASKED


@pytest.mark.parametrize("state", STAGES)
def test_a_session_that_is_ended_answers_nothing(make_world, state: str):
    world = make_world(3)
    world.until(state)
    world.clinics[VICTIM].end()
    world.assert_over(world.clinics[VICTIM])


def test_a_second_list_of_survivors_is_not_signed(make_world):
    world = make_world(5)
    world.until("unmask")
    with pytest.raises(OutOfOrder):
        world.clinics[VICTIM].receive("check", Survivors(frozenset({0, 1, 2, 3})).to_bytes(5))
    assert world.clinics[VICTIM].state is State.CHECKED


def test_a_second_list_is_not_unmasked(make_world):
    world = make_world(5)
    request = request_of(world)
    world.run()
    fewer = replace(request, survivors=frozenset({0, 1, 2, 3}), dropped=frozenset({4}))
    for data in (request.to_bytes(5), fewer.to_bytes(5)):
        with pytest.raises(OutOfOrder):
            world.clinics[VICTIM].receive("unmask", data)


def test_a_step_that_is_being_taken_is_not_taken_twice(make_world):
    """Say, by a message that comes in another thread while the vector is being masked."""
    world = make_world(3)
    request = world.until("masked")[VICTIM]
    clinic = world.clinics[VICTIM]
    asked_again: list[type[Exception]] = []

    class Curious:
        def masked(self, *_: Any) -> bytes:
            for stage in STAGES:
                with pytest.raises(OutOfOrder) as caught:
                    clinic.receive(stage, request)
                asked_again.append(caught.type)
            return b"masked"

    clinic._contribution = Curious()
    assert clinic.receive("masked", request) == b"masked"
    assert asked_again == [OutOfOrder] * 5


def test_a_step_that_is_interrupted_ends_the_session(make_world):
    world = make_world(3)
    request = world.until("masked")[VICTIM]
    clinic = world.clinics[VICTIM]

    class Interrupted:
        def masked(self, *_: Any) -> bytes:
            raise KeyboardInterrupt

    clinic._contribution = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        clinic.receive("masked", request)
    world.assert_over(clinic)


def test_a_first_request_with_content_is_refused(make_world):
    make_world(3).assert_refused(VICTIM, "keys", b"\x00", AggregationRefused)


# damaged bytes


@cache
def at_stage(make_world, stage: str) -> Any:
    world = make_world(4)
    world.until(stage)
    return world


def fresh(clinic):
    """Return a copy of a session, so that a refusal does not end the original."""
    it = copy.copy(clinic)
    it._secrets = copy.copy(clinic._secrets)
    it._secrets.shares = dict(clinic._secrets.shares)
    return it


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    kind = draw(st.sampled_from(["cut", "longer", "flipped", "garbage"]))
    if kind == "cut" and data:
        return data[: draw(st.integers(0, len(data) - 1))]
    if kind == "flipped" and data:
        at, bit = draw(st.integers(0, len(data) - 1)), draw(st.integers(0, 7))
        return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]
    if kind == "garbage":
        return draw(st.binary(max_size=1000))
    return data + draw(st.binary(min_size=1, max_size=100))


@pytest.mark.parametrize("stage", STAGES)
@settings(max_examples=120, deadline=None)
@given(draw=st.data())
def test_a_damaged_request_is_refused_by_name(make_world, stage: str, draw: st.DataObject):
    world = at_stage(make_world, stage)
    request = world.server.requests()[VICTIM]
    data = draw.draw(damaged(request))
    clinic = fresh(world.clinics[VICTIM])
    if data == request:
        return
    try:
        clinic.receive(stage, data)
    except (AggregationRefused, SealingError):
        world.assert_over(clinic)
    else:
        # The one damage that makes another valid request: a survivor less.
        assert stage == "check"
        assert data in (b"\x07", b"\x0b", b"\x0e")


@pytest.mark.parametrize("stage", STAGES[1:])
def test_a_request_cut_anywhere_is_refused(make_world, stage: str):
    world = at_stage(make_world, stage)
    request = world.server.requests()[VICTIM]
    for length in range(len(request)):
        clinic = fresh(world.clinics[VICTIM])
        with pytest.raises((AggregationRefused, SealingError)):
            clinic.receive(stage, request[:length])
        assert clinic.state is State.ENDED


@pytest.mark.parametrize("stage", STAGES)
def test_a_longer_request_is_refused(make_world, stage: str):
    world = at_stage(make_world, stage)
    request = world.server.requests()[VICTIM]
    world.assert_refuses(fresh(world.clinics[VICTIM]), stage, request + b"\x00", AggregationRefused)


@pytest.mark.parametrize("stage", ["masked", "check", "unmask"])
def test_a_bit_for_a_clinic_that_there_is_not_is_refused(make_world, stage: str):
    world = at_stage(make_world, stage)
    request = world.server.requests()[VICTIM]
    data = bytes([request[0] | 0x10]) + request[1:]
    world.assert_refuses(fresh(world.clinics[VICTIM]), stage, data, AggregationRefused)


def test_a_list_of_too_many_clinics_is_refused_unread(make_world):
    world = at_stage(make_world, "shares")
    data = struct.pack("<HH", 3, 1001)
    with pytest.raises(AggregationRefused, match="1001 clinics"):
        fresh(world.clinics[VICTIM]).receive("shares", data)
