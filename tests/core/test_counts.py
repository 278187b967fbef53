"""Sentences for people are grammatical, however many things there are."""

import pytest

from fedpeft.counts import counted


@pytest.mark.parametrize(("number", "text"), [(0, "0 clinics"), (1, "1 clinic"), (2, "2 clinics")])
def test_one_thing_is_not_many(number: int, text: str):
    assert counted(number, "clinic") == text


def test_a_plural_of_its_own_is_kept():
    assert [counted(n, "entry", "entries") for n in (1, 3)] == ["1 entry", "3 entries"]
