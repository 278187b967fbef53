"""What a box remembers from one stick to the next, and that one program works on it."""

from pathlib import Path

import pytest

from fedpeft.errors import AdapterNotHeld, StickRefused, StorageError
from fedpeft.protocol.parcel import whole
from fedpeft.sealing import Identity
from fedpeft_client.box_lock import only_program
from fedpeft_client.sticks.memory import KeptPlaces, KeptShelf, StickMemory
from tests.client.test_shelf import FIRST, SECOND, changed, clinic, request, values

IDENTITY = Identity.generate()
FIRST_ID, SECOND_ID = "1" * 64, "2" * 64


def memory_in(folder: Path, identity: Identity = IDENTITY) -> StickMemory:
    return StickMemory(folder, identity)


# What is refused


def test_a_question_before_the_last_answer_is_old(tmp_path: Path):
    memory_in(tmp_path).keep_answer(FIRST_ID, b"one")
    memory_in(tmp_path).keep_answer(SECOND_ID, b"two")
    with pytest.raises(StickRefused, match="is old"):
        memory_in(tmp_path).answer_to(FIRST_ID, run=7)


def test_a_run_that_was_left_is_old(tmp_path: Path):
    memory_in(tmp_path).advance(7, (1, 0, 1))
    memory_in(tmp_path).advance(8, (1, 0, 1))
    with pytest.raises(StickRefused, match="is old"):
        memory_in(tmp_path).answer_to(FIRST_ID, run=7)
    assert memory_in(tmp_path).answer_to(FIRST_ID, run=8) is None
    assert memory_in(tmp_path).answer_to(FIRST_ID, run=9) is None


def test_a_memory_of_another_identity_is_told(tmp_path: Path):
    memory_in(tmp_path).advance(7, (1, 0, 1))
    with pytest.raises(StorageError, match="another identity"):
        memory_in(tmp_path, Identity.generate())


def test_an_adapter_that_cannot_be_read_counts_as_lost(tmp_path: Path):
    KeptShelf(memory_in(tmp_path)).take(clinic(), request(FIRST, whole(FIRST)))
    (tmp_path / "sticks" / "held").write_bytes(b"damaged")
    with pytest.raises(AdapterNotHeld):
        KeptShelf(memory_in(tmp_path)).take(clinic(), request(SECOND, changed(FIRST, SECOND)))


def test_two_programs_do_not_work_on_one_box(tmp_path: Path):
    with (
        only_program(tmp_path),
        pytest.raises(StorageError, match="another program"),
        only_program(tmp_path),
    ):
        pass
    with only_program(tmp_path):
        pass


# What is remembered


def test_the_last_question_gets_the_same_answer_in_every_process(tmp_path: Path):
    memory_in(tmp_path).keep_answer(FIRST_ID, b"one")
    assert memory_in(tmp_path).answer_to(FIRST_ID, run=7) == b"one"
    assert memory_in(tmp_path).answer_to(SECOND_ID, run=7) is None


def test_an_answer_counts_from_when_it_is_on_the_disk(tmp_path: Path):
    memory_in(tmp_path).keep_answer(FIRST_ID, b"one")
    diary = (tmp_path / "sticks" / "diary").read_bytes()
    memory_in(tmp_path).keep_answer(SECOND_ID, b"two")
    # As after a kill between the two writes of the second answer.
    (tmp_path / "sticks" / "diary").write_bytes(diary)
    assert memory_in(tmp_path).answer_to(SECOND_ID, run=7) == b"two"
    with pytest.raises(StickRefused, match="is old"):
        memory_in(tmp_path).answer_to(FIRST_ID, run=7)


def test_how_far_a_run_has_come_outlives_the_process(tmp_path: Path):
    KeptPlaces(memory_in(tmp_path)).advance(clinic(), 7, (3, 1, 2))
    places = KeptPlaces(memory_in(tmp_path))
    assert places.latest(clinic(), 7) == (3, 1, 2)
    assert places.latest(clinic(), 8) is None


def test_the_adapter_that_is_held_outlives_the_process(tmp_path: Path):
    KeptShelf(memory_in(tmp_path)).take(clinic(), request(FIRST, whole(FIRST)))
    held = KeptShelf(memory_in(tmp_path)).take(clinic(), request(SECOND, changed(FIRST, SECOND)))
    assert values(held) == values(SECOND)
    assert values(KeptShelf(memory_in(tmp_path)).take(clinic(), request(SECOND, None))) == values(
        SECOND
    )


def test_nothing_that_is_remembered_lies_in_the_clear(tmp_path: Path):
    memory = memory_in(tmp_path)
    KeptShelf(memory).take(clinic(), request(FIRST, whole(FIRST)))
    memory.keep_answer(FIRST_ID, b"an answer")
    files = sorted((tmp_path / "sticks").iterdir())
    assert [path.name for path in files] == ["answer", "diary", "held"]
    data = b"".join(path.read_bytes() for path in files)
    assert not any(word in data for word in (b"an answer", b"schema", FIRST.digest.encode()))
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
