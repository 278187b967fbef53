"""What people read while a run goes on: each step of a sum, who is awaited, who fell away."""

import re

from fedpeft.secagg import STAGES
from fedpeft_server.rounds.narration import Narration, round_sentence
from tests.server.sites import record

FOUR = ["anna", "bert", "carl", "dora"]


def told(*asked: tuple[str, list[str]]) -> list[str]:
    lines: list[str] = []
    narration = Narration(lines.append, 5)
    for kind, clinics in asked:
        narration.asked(1, kind, clinics)
    return lines


def test_each_later_step_of_a_sum_is_one_line_with_its_place_and_who_is_awaited():
    for kind in ("train", "evaluate"):
        lines = told((kind, FOUR), *((f"{kind}.{stage}", FOUR) for stage in STAGES))
        assert len(lines) == len(STAGES)
        assert [int(n) for line in lines for n in re.findall(r"step (\d) of 5", line)] == [
            2,
            3,
            4,
            5,
        ]
        assert all("anna, bert, carl, dora" in line for line in lines)
        assert not any("without" in line for line in lines)


def test_who_fell_away_is_named_in_the_next_step_and_not_again():
    three = [name for name in FOUR if name != "bert"]
    lines = told(
        ("train", FOUR),
        ("train.keys", FOUR),
        ("train.shares", FOUR),
        ("train.masked", three),
        ("train.check", three),
    )
    assert [("without bert" in line) for line in lines] == [False, False, True, False]


def test_who_is_missing_at_first_and_there_in_a_repetition_is_not_missed():
    lines = told(("train", FOUR), ("train.shares", FOUR[1:]), ("train", FOUR))
    assert "without anna" in lines[1]
    assert lines[2] == "round 1/5: training: anna, bert, carl, dora"


def test_one_clinic_is_one_clinic():
    alone = record(1).model_copy(update={"participants": ("anna",)})
    assert round_sentence(alone, 5).startswith("round 1/5: 1 clinic, ")
    assert round_sentence(record(1), 5).startswith("round 1/5: 3 clinics, ")
