"""A malicious server against real clinics, with false keys, rosters, thresholds and shares."""

import struct
from dataclasses import replace
from typing import Any

import pytest

from fedpeft.errors import (
    BadShare,
    InconsistentLists,
    OtherModelSent,
    TooFewClinics,
    UnknownPeer,
    WeakThreshold,
    WrongSignature,
)
from fedpeft.sealing import Identity
from fedpeft.secagg.messages import (
    Advert,
    Entry,
    Inbox,
    Roster,
    advert_statement,
)
from fedpeft.secagg.pairwise import EphemeralKey

VICTIM = "c001"
P = 2**255 - 19
SMALL_ORDER = [
    number.to_bytes(32, "little")
    for number in (
        0,
        1,
        0x00B8495F16056286FDB1329CEB8D09DA6AC49FF1FAE35616AEB8413B7C7AEBE0,
        0x57119FD0DD4E22D8868E1C58C45C44045BEF839C55B1D0B1248C50A3BC959C5F,
        P - 1,
        P,
        P + 1,
        2**255,
    )
]


def raw_roster(threshold: int, entries) -> bytes:
    """Return the bytes of a roster that may be none: unsorted, or with doubles."""
    parts = [struct.pack("<HH", threshold, len(entries))]
    for entry in entries:
        name = entry.name.encode()
        parts += [bytes([len(name)]), name, entry.signing, entry.advert.to_bytes()]
    return b"".join(parts)


def roster_at_shares(world) -> Roster:
    return Roster.from_bytes(world.until("shares")[VICTIM])


def signed_entry(session, name: str, identity: Identity, share_key: bytes, mask_key: bytes):
    """Return the entry of a clinic that the server plays."""
    statement = advert_statement(session, name, share_key, mask_key)
    advert = Advert(session.hint, share_key, mask_key, identity.sign(statement))
    return Entry(name, identity.public.signing_bytes, advert)


def changed(roster: Roster, clinic: str, /, **changes: Any) -> list[Entry]:
    """Return the entries, with one clinic's name, identity or keys changed."""

    def change(entry: Entry) -> Entry:
        if entry.name != clinic:
            return entry
        of_entry = {key: value for key, value in changes.items() if key in ("name", "signing")}
        of_advert = {key: value for key, value in changes.items() if key not in of_entry}
        return replace(entry, advert=replace(entry.advert, **of_advert), **of_entry)

    return [change(entry) for entry in roster.entries]


# the roster: who takes part, under which keys and threshold

NEW_KEY = EphemeralKey.generate().public
NEW_IDENTITY = Identity.generate()


@pytest.mark.parametrize(
    "change",
    [
        {"mask_key": NEW_KEY},
        {"share_key": NEW_KEY},
        {"signing": NEW_IDENTITY.public.signing_bytes},
        {"signing": bytes(32)},
        {"signature": bytes(64)},
    ],
    ids=lambda it: f"{next(iter(it))}",
)
def test_a_substituted_key_of_a_peer_is_refused(make_world, change: dict[str, bytes]):
    world = make_world(4)
    roster = roster_at_shares(world)
    data = raw_roster(roster.threshold, changed(roster, "c002", **change))
    world.assert_refused(VICTIM, "shares", data, WrongSignature)


def test_a_peer_replaced_as_a_whole_is_refused_by_its_pinned_identity(make_world):
    world = make_world(4)
    roster = roster_at_shares(world)
    fake = signed_entry(world.session, "c002", NEW_IDENTITY, NEW_KEY, NEW_KEY[::-1])
    entries = [fake if entry.name == "c002" else entry for entry in roster.entries]
    data = raw_roster(roster.threshold, entries)
    world.assert_refused(VICTIM, "shares", data, UnknownPeer)


def test_a_clinic_that_nobody_knows_is_refused(make_world):
    world = make_world(4)
    roster = roster_at_shares(world)
    sybil = signed_entry(world.session, "z", NEW_IDENTITY, NEW_KEY, NEW_KEY[::-1])
    data = raw_roster(4, [*roster.entries, sybil])
    world.assert_refused(VICTIM, "shares", data, UnknownPeer)


@pytest.mark.parametrize(
    "change",
    [
        {"mask_key": NEW_KEY},
        {"share_key": NEW_KEY},
        {"signature": bytes(64)},
        {"hint": bytes(8)},
        {"signing": NEW_IDENTITY.public.signing_bytes},
        {"name": "c0011"},
    ],
    ids=lambda it: f"{next(iter(it))}",
)
def test_a_list_that_alters_the_clinics_own_entry_is_refused(make_world, change):
    world = make_world(4)
    roster = roster_at_shares(world)
    data = raw_roster(roster.threshold, changed(roster, VICTIM, **change))
    world.assert_refused(VICTIM, "shares", data, InconsistentLists)


def test_a_list_without_the_clinic_itself_is_refused(make_world):
    world = make_world(5)
    roster = roster_at_shares(world)
    entries = [entry for entry in roster.entries if entry.name != VICTIM]
    data = raw_roster(roster.threshold, entries)
    world.assert_refused(VICTIM, "shares", data, InconsistentLists)


@pytest.mark.parametrize("doubled", [VICTIM, "c002"])
def test_a_clinic_listed_twice_is_refused(make_world, doubled: str):
    world = make_world(4)
    roster = roster_at_shares(world)
    entries = sorted(
        [*roster.entries, roster.entries[roster.place(doubled)]], key=lambda entry: entry.name
    )
    data = raw_roster(4, entries)
    world.assert_refused(VICTIM, "shares", data, InconsistentLists)


def test_an_unsorted_list_is_refused(make_world):
    world = make_world(4)
    roster = roster_at_shares(world)
    data = raw_roster(roster.threshold, roster.entries[::-1])
    world.assert_refused(VICTIM, "shares", data, InconsistentLists)


@pytest.mark.parametrize("name", ["", "a b", "../c", "c\n", "é", "x" * 65])
def test_a_list_with_a_name_that_is_none_is_refused(make_world, name: str):
    world = make_world(4)
    roster = roster_at_shares(world)
    entries = sorted(changed(roster, "c002", name=name), key=lambda entry: entry.name)
    data = raw_roster(roster.threshold, entries)
    world.assert_refused(VICTIM, "shares", data, InconsistentLists)


@pytest.mark.parametrize("same", ["signing", "share_key", "mask_key"])
@pytest.mark.parametrize("owner", [VICTIM, "c002"])
def test_two_clinics_with_the_same_key_are_refused_though_both_signed(
    make_world, same: str, owner: str
):
    """The third is the server's own clinic, which took over a key of another."""
    world = make_world(4)
    roster = roster_at_shares(world)
    taken = roster.entries[roster.place(owner)]
    keys = {"share_key": NEW_KEY, "mask_key": NEW_KEY[::-1]}
    if same == "signing":
        identity = world.identities[owner]
    else:
        identity = world.identities["c003"]
        keys[same] = getattr(taken.advert, same)
    fake = signed_entry(world.session, "c003", identity, **keys)
    data = raw_roster(roster.threshold, [*roster.entries[:3], fake])
    world.assert_refused(VICTIM, "shares", data, InconsistentLists)


@pytest.mark.parametrize("key", SMALL_ORDER, ids=lambda key: key[:4].hex() + key[-1:].hex())
@pytest.mark.parametrize("which", ["share_key", "mask_key"])
def test_a_key_of_small_order_is_refused_before_anything_is_shared(
    make_world, which: str, key: bytes
):
    world = make_world(4)
    roster = roster_at_shares(world)
    keys = {"share_key": NEW_KEY, "mask_key": NEW_KEY[::-1], which: key}
    fake = signed_entry(world.session, "c003", world.identities["c003"], **keys)
    data = raw_roster(roster.threshold, [*roster.entries[:3], fake])
    world.assert_refused(VICTIM, "shares", data, BadShare)


@pytest.mark.parametrize(("clinics", "threshold"), [(4, 2), (4, 0), (6, 4), (10, 6)])
def test_a_threshold_below_the_floor_is_refused(make_world, clinics: int, threshold: int):
    world = make_world(clinics)
    data = raw_roster(threshold, roster_at_shares(world).entries)
    world.assert_refused(VICTIM, "shares", data, WeakThreshold)


def test_a_clinic_holds_to_its_own_adversary_whatever_the_server_assumes(make_world):
    world = make_world(7)
    data = raw_roster(4, roster_at_shares(world).entries)  # enough if the server were curious
    world.assert_refused(VICTIM, "shares", data, WeakThreshold)


def test_a_threshold_above_the_number_of_clinics_is_refused(make_world):
    world = make_world(4)
    data = raw_roster(5, roster_at_shares(world).entries)
    world.assert_refused(VICTIM, "shares", data, TooFewClinics)


def test_a_sum_of_two_is_refused(make_world):
    world = make_world(4)
    data = raw_roster(2, roster_at_shares(world).entries[:2])
    world.assert_refused(VICTIM, "shares", data, WeakThreshold)


# other sessions, models and rosters


@pytest.mark.parametrize("change", [{"model": b"n" * 32}, {"round": 4}, {"attempt": 2}, {"run": 8}])
def test_clinics_that_were_sent_different_things_leave_the_round(make_world, make_session, change):
    world = make_world(4)
    other = make_world(4, identities=world.identities, session=make_session(**change))
    mine, theirs = roster_at_shares(world), roster_at_shares(other)
    data = raw_roster(mine.threshold, [*mine.entries[:2], *theirs.entries[2:]])
    world.assert_refused(VICTIM, "shares", data, OtherModelSent)


def test_a_forged_hint_does_not_hide_that_another_model_was_sent(make_world, make_session):
    world = make_world(4)
    session = make_session(model=b"n" * 32)
    other = make_world(4, identities=world.identities, session=session)
    mine, theirs = roster_at_shares(world), roster_at_shares(other)
    forged = changed(theirs, "c002", hint=world.session.hint)
    data = raw_roster(mine.threshold, [*mine.entries[:2], forged[2], mine.entries[3]])
    world.assert_refused(VICTIM, "shares", data, WrongSignature)


def inbox_of(world, name: str = VICTIM) -> Inbox:
    return Inbox.from_bytes(world.until("masked")[name], len(world.names))


def with_box(inbox: Inbox, at: int, box: bytes) -> Inbox:
    return replace(inbox, boxes=(*inbox.boxes[:at], box, *inbox.boxes[at + 1 :]))


def test_a_share_from_another_pair_is_refused(make_world):
    world = make_world(4)
    inbox = inbox_of(world)
    data = replace(inbox, boxes=inbox.boxes[::-1]).to_bytes(4)
    world.assert_refused(VICTIM, "masked", data, BadShare)


def test_a_share_for_another_clinic_is_refused(make_world):
    world = make_world(4)
    data = with_box(inbox_of(world), 0, inbox_of(world, "c002").boxes[0]).to_bytes(4)
    world.assert_refused(VICTIM, "masked", data, BadShare)


def test_a_clinics_own_share_sent_back_to_it_is_refused(make_world):
    world = make_world(4)
    data = with_box(inbox_of(world), 1, inbox_of(world, "c002").boxes[1]).to_bytes(4)
    world.assert_refused(VICTIM, "masked", data, BadShare)


@pytest.mark.parametrize("change", [{"attempt": 2}, {"round": 4}])
def test_a_share_replayed_from_another_session_is_refused(make_world, make_session, change):
    world = make_world(4)
    other = make_world(4, identities=world.identities, session=make_session(**change))
    data = with_box(inbox_of(world), 2, inbox_of(other).boxes[2]).to_bytes(4)
    world.assert_refused(VICTIM, "masked", data, BadShare)


def test_clinics_that_were_given_different_thresholds_cannot_open_shares(make_world):
    """Lower thresholds for some would let the server restore their secrets from fewer."""
    world = make_world(4)
    roster = roster_at_shares(world)
    server = world.server
    for name in world.names:
        threshold = 4 if name == VICTIM else roster.threshold
        answer = world.clinics[name].receive("shares", raw_roster(threshold, roster.entries))
        server.receive(name, answer)
    server.close()
    for name in (VICTIM, "c002"):
        world.assert_refused(name, "masked", server.requests()[name], BadShare)


def test_clinics_that_were_given_different_lists_of_clinics_cannot_open_shares(make_world):
    world = make_world(5)
    roster = roster_at_shares(world)
    fewer = raw_roster(roster.threshold, roster.entries[:4])
    boxes: dict[str, bytes] = {}
    for name in world.names[:4]:
        sent = fewer if name == VICTIM else roster.to_bytes()
        boxes[name] = world.clinics[name].receive("shares", sent)[32:]
    # Each but the victim has its box for the victim, place 1, at the right place for it.
    own = [boxes["c000"][:82], boxes["c002"][82:164], boxes["c003"][82:164]]
    data = Inbox(frozenset(range(4)), tuple(own)).to_bytes(4)
    world.assert_refused(VICTIM, "masked", data, BadShare)
