"""When a round that too few clinics answered is asked for again, and when that is vain."""

from collections.abc import Mapping
from typing import Any, cast

import pytest

from fedpeft.config import FederationSettings
from fedpeft_server.link.link import Link
from fedpeft_server.rounds.collection import Collected
from fedpeft_server.rounds.quorum import Quorum
from fedpeft_server.rounds.watcher import Watcher

CLINICS = ("a", "b", "c", "d")


class Clinics:
    """Those that are enrolled, and those of them that are connected."""

    def __init__(self, enrolled: int, connected: int) -> None:
        self._names: dict[int, str] = dict(enumerate(CLINICS[:enrolled]))
        self._connected = list(self._names)[:connected]

    @property
    def grid(self) -> "Clinics":
        return self

    def get_node_ids(self) -> list[int]:
        return self._connected

    def names(self) -> dict[int, str]:
        return self._names


def quorum(**changes: Any) -> Quorum:
    settings = FederationSettings.model_validate({"name": "demo", **changes})
    return Quorum(settings, cast("Watcher", None))  # nothing is told where nobody waits


def hopeless(clinics: Clinics, failed: Mapping[str, str], **changes: Any) -> bool:
    link = cast("Link", clinics)
    return quorum(**changes).is_hopeless(link, Collected(failed=dict(failed)))


def test_a_clinic_that_went_offline_may_come_back() -> None:
    assert not hopeless(Clinics(3, 2), {"c": "offline"})
    assert not hopeless(Clinics(3, 0), dict.fromkeys("abc", "offline"))


def test_a_clinic_that_refuses_for_good_is_not_asked_again() -> None:
    assert hopeless(Clinics(3, 3), {"c": "privacy-refused"})
    assert hopeless(Clinics(3, 2), {"c": "privacy-refused"})


def test_refusals_do_not_matter_while_enough_others_are_enrolled() -> None:
    assert not hopeless(Clinics(4, 4), {"d": "privacy-refused"})


def test_an_opened_sum_needs_more_clinics_than_the_minimum() -> None:
    refused = {"c": "privacy-refused", "d": "privacy-refused"}
    sealed = {"aggregation": {"confidentiality": "sealed"}}
    assert hopeless(Clinics(4, 4), refused)
    assert not hopeless(Clinics(4, 4), refused, rounds={"minimum_clinics": 2}, **sealed)


@pytest.mark.parametrize(("count", "words"), [(0, "0 usable answers"), (1, "1 usable answer ")])
def test_what_is_missing_is_said_in_numbers(count: int, words: str) -> None:
    found = Collected(participants=CLINICS[:count], failed={"d": "offline"})
    assert words in quorum().missing(found)
    assert "d: offline" in quorum().missing(found)
