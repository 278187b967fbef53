"""The book of other clinics: what was pinned holds until a person decides otherwise."""

import json
import stat
from pathlib import Path

import pytest

from fedpeft.errors import EnrolmentError, StorageError, UnknownPeer
from fedpeft_client.peers import PeerBook, key_fingerprint

ANNA, BERT, CARL, OTHER = (bytes([number]) * 32 for number in range(1, 5))


@pytest.fixture(params=["file", "memory"])
def book(request, tmp_path) -> PeerBook:
    path = tmp_path / "peers.json" if request.param == "file" else None
    return PeerBook(path, accept_new=True)


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "peers.json"


def test_new_clinics_are_pinned_and_named_once(book):
    assert book.admit({"bert": BERT, "anna": ANNA}) == ["anna", "bert"]
    assert book.admit({"anna": ANNA, "carl": CARL}) == ["carl"]
    assert book.admit({"anna": ANNA}) == []
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

    assert book.admit({"anna": ANNA}) == []
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
    assert book.admit({"anna": OTHER, "bert": BERT}) == ["anna"]


def test_forgetting_a_stranger_is_an_error(book):
    with pytest.raises(EnrolmentError, match="no clinic named 'anna'"):
        book.forget("anna")


def test_pins_are_on_the_disk_for_the_owner_alone(path):
    PeerBook(path, accept_new=True).admit({"anna": ANNA})

    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert json.loads(path.read_text()) == {"schema": 1, "peers": {"anna": ANNA.hex()}}
    assert PeerBook(path, accept_new=False).admit({"anna": ANNA}) == []


def test_what_another_process_forgot_is_forgotten_here(path):
    running, beside = (PeerBook(path, accept_new=True) for _ in range(2))
    running.admit({"anna": ANNA})

    beside.forget("anna")

    assert running.admit({"anna": OTHER}) == ["anna"]


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
