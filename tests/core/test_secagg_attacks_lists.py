"""A malicious server against real clinics, with false lists of who shared and who survived."""

from dataclasses import replace

import pytest

from fedpeft.errors import (
    InconsistentLists,
    TooFewClinics,
)
from fedpeft.sealing import Identity
from fedpeft.secagg.messages import (
    Inbox,
    Survivors,
    Unmasking,
    survivors_statement,
)

VICTIM = "c001"


def inbox_of(world, name: str = VICTIM) -> Inbox:
    return Inbox.from_bytes(world.until("masked")[name], len(world.names))


# who shared, who survived, who vouches for it


def test_a_list_of_sharers_without_the_clinic_itself_is_refused(make_world):
    world = make_world(5)
    inbox = inbox_of(world)
    data = replace(inbox, senders=inbox.senders - {1}).to_bytes(5)[: 1 + 3 * 82]
    world.assert_refused(VICTIM, "masked", data, InconsistentLists)


@pytest.mark.parametrize("senders", [{1}, {0, 1}, {0, 1, 2}])
def test_fewer_sharers_than_the_threshold_are_refused(make_world, senders: set[int]):
    world = make_world(5)
    inbox = inbox_of(world)
    few = Inbox(frozenset(senders), inbox.boxes[: len(senders) - 1])
    world.assert_refused(VICTIM, "masked", few.to_bytes(5), TooFewClinics)


@pytest.mark.parametrize(
    ("members", "error"),
    [
        ({0, 2, 3, 4, 5}, InconsistentLists),
        ({1, 2, 3, 4, 6}, InconsistentLists),
        ({1}, TooFewClinics),
        ({0, 1, 2, 3}, TooFewClinics),
    ],
    ids=["without itself", "with one that shared nothing", "alone", "below the threshold"],
)
def test_a_bad_list_of_survivors_is_refused(make_world, members: set[int], error):
    world = make_world(7)
    world.until("shares")
    world.step(absent={"c006"})
    world.step(absent={"c006"})
    data = Survivors(frozenset(members)).to_bytes(7)
    world.assert_refused(VICTIM, "check", data, error)


def request_of(world, name: str = VICTIM) -> Unmasking:
    return Unmasking.from_bytes(world.until("unmask")[name], len(world.names))


@pytest.mark.parametrize("both", [{0}, {1}, {0, 1, 2, 3, 4}])
def test_a_clinic_listed_as_alive_and_as_dropped_is_refused(make_world, both: set[int]):
    """Flower's SecAgg+ gave up both secrets of such a clinic."""
    world = make_world(5)
    data = replace(request_of(world), dropped=frozenset(both)).to_bytes(5)
    world.assert_refused(VICTIM, "unmask", data, InconsistentLists)


@pytest.mark.parametrize(
    ("survivors", "dropped"),
    [({0, 1, 2, 3}, {4}), ({0, 1, 2, 3}, set()), ({1, 2, 3, 4}, {0}), (set(), set())],
)
def test_unmasking_another_list_than_was_signed_is_refused(make_world, survivors, dropped):
    world = make_world(5)
    request = request_of(world)
    signatures = {at: it for at, it in request.signatures.items() if at in survivors}
    data = Unmasking(frozenset(survivors), frozenset(dropped), signatures).to_bytes(5)
    world.assert_refused(VICTIM, "unmask", data, InconsistentLists)


@pytest.mark.parametrize("dropped", [set(), {0, 5, 6}, {6}])
def test_dropped_clinics_are_exactly_those_that_shared_and_did_not_survive(make_world, dropped):
    world = make_world(7)
    world.until("shares")
    world.step(absent={"c006"})
    world.step(absent={"c005", "c006"})
    world.step(absent={"c005", "c006"})
    data = replace(request_of(world), dropped=frozenset(dropped)).to_bytes(7)
    world.assert_refused(VICTIM, "unmask", data, InconsistentLists)


def test_different_lists_of_survivors_for_different_clinics_open_nothing(make_world):
    world = make_world(5)
    world.until("check")
    roster, names = world.server._agreed, world.names
    lists = {name: frozenset(range(5)) for name in names}
    lists["c003"] = lists["c004"] = frozenset({1, 2, 3, 4})
    signatures = {
        at: world.clinics[name].receive("check", Survivors(lists[name]).to_bytes(5))
        for at, name in enumerate(names)
    }
    for name in names:
        listed = lists[name]
        given_out = {at: it for at, it in signatures.items() if at in listed}
        request = Unmasking(listed, frozenset(range(5)) - listed, given_out)
        world.assert_refused(name, "unmask", request.to_bytes(5), InconsistentLists)
    assert roster.threshold == 4


@pytest.mark.parametrize("count", [0, 1, 3])
def test_fewer_signatures_than_the_threshold_are_refused(make_world, count: int):
    world = make_world(5)
    request = request_of(world)
    few = replace(request, signatures={at: request.signatures[at] for at in range(count)})
    world.assert_refused(VICTIM, "unmask", few.to_bytes(5), TooFewClinics)


@pytest.mark.parametrize("place", range(5))
def test_a_forged_signature_on_the_list_is_refused(make_world, place: int):
    world = make_world(5)
    request = request_of(world)
    forged = {**request.signatures, place: Identity.generate().sign(b"")}
    data = replace(request, signatures=forged).to_bytes(5)
    world.assert_refused(VICTIM, "unmask", data, InconsistentLists)


def test_one_signature_for_several_clinics_is_refused(make_world):
    world = make_world(5)
    request = request_of(world)
    data = replace(request, signatures=dict.fromkeys(range(5), request.signatures[0])).to_bytes(5)
    world.assert_refused(VICTIM, "unmask", data, InconsistentLists)


def test_the_signature_of_one_that_did_not_survive_is_refused(make_world):
    world = make_world(5)
    world.until("masked")
    world.step(absent={"c004"})
    world.step()
    request = request_of(world)
    statement = survivors_statement(world.session, world.server._agreed, request.survivors)
    vouched = {**request.signatures, 4: world.identities["c004"].sign(statement)}
    data = replace(request, signatures=vouched).to_bytes(5)
    world.assert_refused(VICTIM, "unmask", data, InconsistentLists)


def test_signatures_of_another_session_are_refused(make_world, make_session):
    world = make_world(4)
    other = make_world(4, identities=world.identities, session=make_session(attempt=2))
    data = replace(request_of(world), signatures=request_of(other).signatures).to_bytes(4)
    world.assert_refused(VICTIM, "unmask", data, InconsistentLists)
