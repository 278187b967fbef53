"""The words by which two people recognise a federation."""

from itertools import combinations

import pytest

from fedpeft.errors import EnrolmentError
from fedpeft.sealing.identity import Identity
from fedpeft.sealing.words import COUNT, WORDS, federation_words, same_words
from fedpeft_server.site.pki import create_authority


def nearly_alike(one: str, other: str) -> bool:
    """Say whether one letter that is exchanged, added or left out makes one word the other."""
    if len(one) == len(other):
        return sum(a != b for a, b in zip(one, other, strict=True)) < 2
    short, long = sorted((one, other), key=len)
    return len(long) == len(short) + 1 and any(
        long[:at] + long[at + 1 :] == short for at in range(len(long))
    )


@pytest.fixture(scope="module")
def ca(tmp_path_factory) -> str:
    return create_authority(tmp_path_factory.mktemp("pki") / "keys", "localhost:1").ca_pem()


def test_ten_words_stand_for_eighty_bits():
    assert len(WORDS) == len(set(WORDS)) == 256
    assert COUNT * 8 >= 80
    assert all(word.isascii() and word.isalpha() and word.islower() for word in WORDS)
    assert max(map(len, WORDS)) <= 8


def test_no_word_is_another_misheard():
    assert [pair for pair in combinations(WORDS, 2) if nearly_alike(*pair)] == []


def test_the_search_for_words_alike_can_fail():
    assert nearly_alike("locket", "rocket")
    assert nearly_alike("sable", "stable")


def test_everything_that_an_invitation_makes_a_clinic_trust_changes_the_words(ca, tmp_path):
    server, stranger = Identity.generate().public, Identity.generate().public
    other = create_authority(tmp_path / "keys", "localhost:1").ca_pem()
    found = {
        federation_words("heart", ca, server),
        federation_words("hear", ca, server),
        federation_words("heart", other, server),
        federation_words("heart", ca, stranger),
    }
    assert len(found) == 4
    assert all(len(words.split()) == COUNT for words in found)
    assert federation_words("heart", ca, server) in found


def test_spaces_around_a_certificate_do_not_change_the_words(ca):
    server = Identity.generate().public
    assert federation_words("heart", f"\n{ca}\n", server) == federation_words("heart", ca, server)


def test_a_damaged_certificate_has_no_words():
    with pytest.raises(EnrolmentError, match="damaged"):
        federation_words("heart", "CA", Identity.generate().public)


def test_words_may_be_typed_as_they_were_heard():
    assert same_words("Amber  basil\nCEDAR", "amber basil cedar")
    assert not same_words("amber basil", "basil amber")
