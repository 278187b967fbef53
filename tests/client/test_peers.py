"""The book of other clinics: what was pinned holds until a person decides otherwise."""

import json
import stat
from pathlib import Path

import pytest

from fedpeft.errors import (
    EnrolmentError,
    SealingError,
    StorageError,
    UnknownPeer,
    WrongSignature,
)
from fedpeft.sealing import Identity, clinic_role
from fedpeft.sealing.succession import MOST_LINKS, Link, Succession, newest_key
from fedpeft_client.keys.peers import Follow, Met, PeerBook, key_fingerprint

ANNA, BERT, CARL, OTHER = (bytes([number]) * 32 for number in range(1, 5))


@pytest.fixture(params=["file", "memory"])
def book(request, tmp_path) -> PeerBook:
    path = tmp_path / "peers.json" if request.param == "file" else None
    return PeerBook(path, accept_new=True)


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "peers.json"


def test_new_clinics_are_pinned_and_named_once(book):
    assert book.admit({"bert": BERT, "anna": ANNA}) == Met(new=("anna", "bert"))
    assert book.admit({"anna": ANNA, "carl": CARL}) == Met(new=("carl",))
    assert book.admit({"anna": ANNA}) == Met()
    assert book.known() == {
        "anna": key_fingerprint(ANNA),
        "bert": key_fingerprint(BERT),
        "carl": key_fingerprint(CARL),
    }


def test_changed_key_is_refused_and_names_both_fingerprints_and_the_way_out(book):
    book.admit({"anna": ANNA})

    with pytest.raises(UnknownPeer) as caught:
        book.admit({"anna": OTHER})

    for part in ("anna", key_fingerprint(ANNA), key_fingerprint(OTHER), "by telephone"):
        assert part in str(caught.value)
    assert "fedpeft-client peers DIR --forget anna" in str(caught.value)


@pytest.mark.parametrize(
    "peers",
    [
        {"anna": OTHER, "carl": CARL},
        {"carl": ANNA},
        {"carl": CARL, "dora": CARL},
        {"carl": CARL, "dora": b""},
        {"carl": CARL, "dora": bytes(31)},
        {"carl": CARL, "": OTHER},
        {"carl": CARL, "x\x1b[2J": OTHER},
        {"carl": CARL, "x" * 65: OTHER},
    ],
)
def test_one_refused_clinic_leaves_the_book_as_it_was(book, peers):
    book.admit({"anna": ANNA, "bert": BERT})
    before = book.known()

    with pytest.raises(UnknownPeer):
        book.admit(peers)

    assert book.known() == before


def test_new_clinic_is_refused_where_none_may_be(path):
    PeerBook(path, accept_new=True).admit({"anna": ANNA})
    book = PeerBook(path, accept_new=False)

    assert book.admit({"anna": ANNA}) == Met()
    with pytest.raises(UnknownPeer, match=f"never seen the clinic bert.*{key_fingerprint(BERT)}"):
        book.admit({"anna": ANNA, "bert": BERT})
    assert list(book.known()) == ["anna"]


def test_name_with_control_characters_is_not_printed_raw(book):
    with pytest.raises(UnknownPeer) as caught:
        book.admit({"x\x1b[2J" + "y" * 500: ANNA})

    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_forgotten_clinic_counts_as_new(book):
    book.admit({"anna": ANNA, "bert": BERT})

    book.forget("anna")

    assert list(book.known()) == ["bert"]
    assert book.admit({"anna": OTHER, "bert": BERT}).new == ("anna",)


def test_forgetting_a_stranger_is_an_error(book):
    with pytest.raises(EnrolmentError, match="no clinic named 'anna'"):
        book.forget("anna")


def test_pins_are_on_the_disk_for_the_owner_alone(path):
    PeerBook(path, accept_new=True).admit({"anna": ANNA})

    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert json.loads(path.read_text()) == {"schema": 1, "peers": {"anna": ANNA.hex()}}
    assert PeerBook(path, accept_new=False).admit({"anna": ANNA}) == Met()


def test_what_another_process_forgot_is_forgotten_here(path):
    running, beside = (PeerBook(path, accept_new=True) for _ in range(2))
    running.admit({"anna": ANNA})

    beside.forget("anna")

    assert running.admit({"anna": OTHER}).new == ("anna",)


def test_pins_that_cannot_be_written_are_not_accepted(tmp_path):
    with pytest.raises(StorageError):
        PeerBook(tmp_path / "absent" / "peers.json", accept_new=True).admit({"anna": ANNA})


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "null",
        "[" * 5000,
        "\xff",
        '{"schema": 2, "peers": {}}',
        '{"schema": 1}',
        '{"schema": 1, "peers": []}',
        '{"schema": 1, "peers": {"anna": 7}}',
        '{"schema": 1, "peers": {"anna": "zz"}}',
        '{"schema": 1, "peers": {"anna": "00"}}',
        f'{{"schema": 1, "peers": {{"": "{ANNA.hex()}"}}}}',
    ],
)
def test_damaged_book_is_refused_and_kept(path, content):
    path.write_text(content, "latin-1")
    book = PeerBook(path, accept_new=True)

    for use in (lambda: book.admit({"anna": ANNA}), book.known, lambda: book.forget("anna")):
        with pytest.raises(StorageError, match=r"peers\.json is damaged"):
            use()
    assert path.read_text("latin-1") == content


# Keys that were renewed


FEDERATION = "heart"
FIRST, SECOND, THIRD, THIEF = (Identity(bytes([number]) * 128) for number in range(10, 14))


def link(old: Identity, new: Identity, name: str = "anna", federation: str = FEDERATION) -> bytes:
    role = clinic_role(name)
    return Succession.sign(old, new, federation=federation, holder=role).link.to_bytes()


def signing(identity: Identity) -> bytes:
    return identity.public.signing_bytes


def shown(*links: bytes) -> Follow:
    """What the server shows about anna's keys."""

    def follow(name: str, pinned: bytes) -> bytes:
        return newest_key(links, pinned, federation=FEDERATION, holder=clinic_role(name))

    return follow


def test_a_key_that_the_pinned_one_has_signed_takes_its_place_and_is_told(book):
    book.admit({"anna": signing(FIRST), "bert": BERT})

    met = book.admit({"anna": signing(SECOND), "bert": BERT}, shown(link(FIRST, SECOND)))

    assert met == Met(renewed=("anna",))
    assert book.known()["anna"] == key_fingerprint(signing(SECOND))
    assert book.admit({"anna": signing(SECOND)}) == Met()


def test_who_slept_through_two_renewals_follows_both(book):
    book.admit({"anna": signing(FIRST)})
    both = shown(link(FIRST, SECOND), link(SECOND, THIRD))
    assert book.admit({"anna": signing(THIRD)}, both).renewed == ("anna",)


def altered(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize(
    "forged",
    [
        link(THIEF, THIEF).replace(signing(THIEF), signing(FIRST), 1),
        link(FIRST, SECOND, name="bert"),
        link(FIRST, SECOND, federation="lake"),
        *(altered(link(FIRST, SECOND), at) for at in (32, 64, 96, 128, 160, 223, 224, 287)),
    ],
    ids=lambda _: "",
)
def test_a_forged_or_foreign_statement_changes_nothing(book, forged):
    book.admit({"anna": signing(FIRST)})
    for key in (SECOND, THIEF):
        with pytest.raises((WrongSignature, UnknownPeer)):
            book.admit({"anna": signing(key)}, shown(forged))
    assert book.known() == {"anna": key_fingerprint(signing(FIRST))}


@pytest.mark.parametrize(
    "links",
    [
        (),
        (link(SECOND, THIRD),),
        (link(SECOND, THIRD), link(FIRST, SECOND)),
        (link(FIRST, SECOND), link(THIEF, THIRD)),
    ],
    ids=["none", "without its beginning", "in the wrong order", "broken"],
)
def test_a_chain_that_does_not_lead_to_the_key_explains_nothing(book, links):
    book.admit({"anna": signing(FIRST)})
    with pytest.raises(UnknownPeer, match="has not signed that"):
        book.admit({"anna": signing(THIRD)}, shown(*links))


@pytest.mark.parametrize("links", [(), (link(FIRST, SECOND),)])
def test_an_old_key_that_leaked_is_not_taken_back_by_its_own_statement(book, links):
    book.admit({"anna": signing(FIRST)})
    book.admit({"anna": signing(SECOND)}, shown(link(FIRST, SECOND)))
    forked = link(FIRST, THIEF)
    for key, statements in ((FIRST, links), (THIEF, (*links, forked)), (THIEF, (forked, *links))):
        with pytest.raises(UnknownPeer):
            book.admit({"anna": signing(key)}, shown(*statements))
    assert book.known() == {"anna": key_fingerprint(signing(SECOND))}


def test_a_key_from_which_the_chain_goes_on_is_not_accepted(book):
    book.admit({"anna": signing(FIRST)})
    with pytest.raises(UnknownPeer):
        book.admit({"anna": signing(SECOND)}, shown(link(FIRST, SECOND), link(SECOND, THIRD)))


def test_a_renewal_to_the_key_of_another_clinic_is_refused(book):
    book.admit({"anna": signing(FIRST), "bert": signing(SECOND)})
    with pytest.raises(UnknownPeer, match="one and the same key"):
        book.admit({"anna": signing(SECOND)}, shown(link(FIRST, SECOND)))


def test_where_no_new_clinic_may_be_a_known_one_may_renew_its_key(path):
    PeerBook(path, accept_new=True).admit({"anna": signing(FIRST)})
    book = PeerBook(path, accept_new=False)
    assert book.admit({"anna": signing(SECOND)}, shown(link(FIRST, SECOND))).renewed == ("anna",)


def test_more_links_than_are_handed_out_are_refused(book):
    book.admit({"anna": signing(FIRST)})
    many = [link(FIRST, SECOND)] * (MOST_LINKS + 1)
    with pytest.raises(SealingError):
        book.admit({"anna": signing(SECOND)}, shown(*many))


def test_a_link_of_another_length_is_none():
    for data in (b"", link(FIRST, SECOND)[:-1], link(FIRST, SECOND) + b"x"):
        with pytest.raises(SealingError):
            Link.from_bytes(data)
