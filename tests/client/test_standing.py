"""What a process leaves to the next one on its folder, and to no other."""

import json
import shutil
from pathlib import Path

import pytest
from flwr.app import Message, RecordDict
from flwr.app.message import remove_content_from_message

from fedpeft.errors import StorageError
from fedpeft_client.link.standing import STANDING_FILE, KeptStanding, Standing

pytestmark = pytest.mark.usefixtures("flower_identity")


def question() -> Message:
    message = Message(RecordDict(), 7, "train.masked", group_id="3")
    message.metadata.__dict__["_message_id"] = message.object_id
    return remove_content_from_message(message)


def left_behind(folder: Path) -> Message:
    """Let a process die while it has a question to answer."""
    standing, asked = KeptStanding(folder), question()
    standing.online(7)
    standing.asked(asked)
    return asked


def test_a_folder_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(StorageError, match="nowhere"):
        KeptStanding(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'{"schema": 2}', b'{"schema":1,"place":"x","node":"seven"}', b"\xff\xfe"],
)
def test_a_damaged_file_is_as_good_as_none(tmp_path: Path, content: bytes):
    (tmp_path / STANDING_FILE).write_bytes(content)
    standing = KeptStanding(tmp_path)
    assert (standing.node, standing.question) == (0, None)


@pytest.mark.parametrize("coded", ["*", "AAAA", "bm9uZQ==", ""])
def test_a_question_that_is_none_is_as_good_as_none(tmp_path: Path, coded: str):
    left_behind(tmp_path)
    path = tmp_path / STANDING_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), "question": coded}))
    standing = KeptStanding(tmp_path)
    assert (standing.node, standing.question) == (7, None)


def test_a_copy_of_the_folder_is_no_successor(tmp_path: Path):
    (tmp_path / "box").mkdir()
    left_behind(tmp_path / "box")
    shutil.copytree(tmp_path / "box", tmp_path / "copy")
    standing = KeptStanding(tmp_path / "copy")
    assert (standing.node, standing.question) == (0, None)


def test_the_next_process_knows_the_number_and_what_was_asked(tmp_path: Path):
    asked = left_behind(tmp_path)
    standing = KeptStanding(tmp_path)
    assert standing.node == 7
    standing.online(7)
    found = KeptStanding(tmp_path).question
    assert found is not None
    assert found.metadata == asked.metadata
    assert found.content == RecordDict()
    assert (tmp_path / STANDING_FILE).stat().st_mode & 0o777 == 0o600


def test_what_was_answered_is_not_excused(tmp_path: Path):
    left_behind(tmp_path)
    KeptStanding(tmp_path).answered()
    standing = KeptStanding(tmp_path)
    assert (standing.node, standing.question) == (7, None)


def test_after_a_goodbye_nothing_is_left(tmp_path: Path):
    left_behind(tmp_path)
    KeptStanding(tmp_path).left()
    assert list(tmp_path.iterdir()) == []


def test_who_shares_a_folder_keeps_nothing(tmp_path: Path):
    standing = Standing()
    standing.online(7)
    standing.asked(question())
    assert (standing.node, standing.question) == (0, None)
