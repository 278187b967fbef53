"""The rank at which each clinic takes part: as high as it can, and never alone where sums hide."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.config import LEAST_SUMMANDS
from fedpeft.protocol import RankTerms
from fedpeft_server.rounds.ranks import RankPlan
from fedpeft_strategies.declaration import RankRule

RANK = 8
ABLE = st.dictionaries(
    st.sampled_from([f"c{number}" for number in range(12)]), st.integers(1, 12), min_size=1
)


def plan(
    able: dict[str, int], *, hidden: bool, rule: RankRule = "nested", rank: int = RANK
) -> RankPlan:
    made = RankPlan(rule, rank, hidden=hidden)
    made.heard(able)
    return made


def terms_of(able: dict[str, int], *, hidden: bool = True) -> RankTerms:
    """Return the terms of a round of all clinics, of which some cannot train the adapter."""
    terms = plan(able, hidden=hidden).terms(able)
    assert terms is not None
    return terms


def ranks_of(able: dict[str, int], *, hidden: bool, rank: int = RANK) -> dict[str, int]:
    """Return the rank of every clinic in a round of all of them."""
    terms = plan(able, hidden=hidden, rank=rank).terms(able)
    return {name: terms.rank(name) if terms else rank for name in able}


@given(able=ABLE, hidden=st.booleans())
def test_no_clinic_is_asked_for_more_than_it_can_or_the_adapter_has(
    able: dict[str, int], hidden: bool
):
    for name, rank in ranks_of(able, hidden=hidden).items():
        assert 1 <= rank <= min(able[name], RANK)


@given(able=ABLE)
def test_in_a_sum_every_clinic_has_enough_others_at_its_rank_or_above(able: dict[str, int]):
    ranks = ranks_of(able, hidden=True)
    lowest = min(ranks.values())
    for rank in ranks.values():
        beside = sum(other >= rank for other in ranks.values())
        # At the lowest rank everybody is: with too few clinics there is no round at all.
        assert beside >= LEAST_SUMMANDS or rank == lowest


@given(able=ABLE)
def test_where_each_update_is_opened_nobody_is_lowered(able: dict[str, int]):
    made = plan(able, hidden=False)
    assert ranks_of(able, hidden=False) == {name: min(rank, RANK) for name, rank in able.items()}
    assert "fewer columns" not in made.caution(made.terms(able))


@given(able=ABLE, hidden=st.booleans(), data=st.data())
def test_permuting_clinics_changes_nothing(able: dict[str, int], hidden: bool, data: st.DataObject):
    order = data.draw(st.permutations(sorted(able)))
    turned = {name: able[name] for name in order}
    terms = plan(able, hidden=hidden).terms(sorted(able))
    assert plan(turned, hidden=hidden).terms(order) == terms
    if terms is not None:
        assert list(terms.of) == sorted(able)  # the job's text is the same for all


@pytest.mark.parametrize(
    ("able", "expected"),
    [
        ({"a": 8, "b": 8, "c": 8, "d": 4}, {"a": 8, "b": 8, "c": 8, "d": 4}),
        ({"a": 8, "b": 8, "c": 4, "d": 4}, {"a": 4, "b": 4, "c": 4, "d": 4}),
        ({"a": 8, "b": 4, "c": 4, "d": 2}, {"a": 4, "b": 4, "c": 4, "d": 2}),
        ({"a": 8, "b": 6, "c": 4, "d": 2}, {"a": 4, "b": 4, "c": 4, "d": 2}),
        ({"a": 8, "b": 8, "c": 2}, {"a": 2, "b": 2, "c": 2}),
        ({"a": 99, "b": 8, "c": 12, "d": 1}, {"a": 8, "b": 8, "c": 8, "d": 1}),
    ],
)
def test_too_few_at_a_rank_come_down_to_the_next(able: dict[str, int], expected: dict[str, int]):
    assert ranks_of(able, hidden=True) == expected


@given(able=ABLE)
def test_in_a_sum_clinics_count_by_their_rows_only_if_no_rank_has_one_or_two(able: dict[str, int]):
    terms = plan(able, hidden=True).terms(able)
    if terms is not None:
        assert terms.alike is any(count < 3 for count in Counter(terms.of.values()).values())


@given(able=ABLE)
def test_where_each_update_is_opened_clinics_count_by_their_rows(able: dict[str, int]):
    terms = plan(able, hidden=False).terms(able)
    assert terms is None or not terms.alike


@pytest.mark.parametrize(
    ("able", "alike"),
    [
        ([8, 8, 8, 4, 4, 4], False),
        ([8, 8, 8, 4], True),
        ([8, 8, 8, 4, 4], True),
        ([8, 8, 8, 4, 4, 4, 2], True),
        ([8, 4, 4], False),
        ([8, 8, 4, 4], False),
        ([8, 4, 4, 4, 2, 2, 2], False),
    ],
)
def test_it_is_the_ranks_after_lowering_that_say_how_clinics_count(able: list[int], alike: bool):
    assert terms_of({f"c{at}": rank for at, rank in enumerate(able)}).alike is alike


def test_who_was_lowered_is_named():
    able = {"a": 8, "b": 99, "c": 4, "d": 4, "e": 2}
    made = plan(able, hidden=True)
    assert "are trained at a, b than could be" in made.caution(made.terms(able))
    assert made.caution(None) == ""


def test_columns_that_nobody_trains_are_said():
    made = plan({"a": 2, "b": 2, "c": 2}, hidden=True)
    assert "columns of the adapter beyond 2 are trained by nobody" in made.caution(
        made.terms(["a", "b", "c"])
    )


def test_a_clinic_that_will_refuse_is_named_before_it_is_asked_to_train():
    made = RankPlan("same", 8, hidden=True)
    assert made.caution(made.terms(["a", "b"])) == ""
    made.heard({"a": 8, "b": 4})
    assert made.caution(made.terms(["a", "b"])).startswith("b train no rank as high as")


@pytest.mark.parametrize("hidden", [True, False])
def test_where_all_can_train_the_adapter_nothing_is_said_of_ranks(hidden: bool):
    able = {"a": 8, "b": 9, "c": 8}
    assert plan(able, hidden=hidden).terms(able) is None
    assert RankPlan("nested", RANK, hidden=hidden).terms(["a", "b", "c"]) is None


def test_a_strategy_of_one_rank_asks_everybody_for_it():
    assert plan({"a": 1, "b": 2}, hidden=False, rule="same").terms(["a", "b"]) is None


@given(able=ABLE, hidden=st.booleans())
def test_a_clinic_that_is_not_named_gets_the_lowest_rank_of_the_round(
    able: dict[str, int], hidden: bool
):
    terms = plan(able, hidden=hidden).terms(able)
    if terms is not None:
        assert terms.rank("unknown") == min(terms.of.values())


def test_only_the_clinics_of_the_round_count():
    able = {"a": 8, "b": 8, "c": 8, "d": 4, "e": 4}
    made = plan(able, hidden=True)
    without = made.terms(["a", "b", "d", "e"])
    assert without is not None
    assert without.of == {"a": 4, "b": 4, "d": 4, "e": 4}
    assert made.terms(["a", "b", "c"]) is None


def test_what_was_heard_last_counts():
    made = plan({"a": 2, "b": 8}, hidden=False)
    made.heard({"a": 4})
    terms = made.terms(["a", "b"])
    assert terms is not None
    assert terms.of == {"a": 4, "b": 8}


@pytest.mark.parametrize("hidden", [True, False])
def test_a_clinic_that_nothing_was_heard_of_is_asked_for_the_lowest_rank_heard(hidden: bool):
    made = plan({"a": 8, "b": 8, "c": 8, "d": 4, "e": 2}, hidden=hidden)
    terms = made.terms(["a", "b", "c", "d", "e", "new"])
    assert terms is not None
    assert terms.of["new"] == 2
    made.heard({"new": 8})
    terms = made.terms(["a", "b", "c", "d", "e", "new"])
    assert terms is not None
    assert terms.of["new"] == 8


def test_a_clinic_that_nothing_was_heard_of_is_not_lowered():
    made = plan({"a": 2, "b": 2, "c": 2}, hidden=True)
    terms = made.terms(["a", "b", "c", "new"])
    assert terms is not None
    assert terms.of["new"] == 2
    assert "fewer columns" not in made.caution(terms)
