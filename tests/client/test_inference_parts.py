"""The parts of the server and the engine that need no model."""

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.errors import BadRequest, InferenceError, StorageError, UnknownAdapter
from fedpeft_client.inference.answers import QueuedAnswer
from fedpeft_client.inference.api_key import load_api_key
from fedpeft_client.inference.catalogue import Catalogue
from fedpeft_client.inference.engine import Piece, Usage
from fedpeft_client.inference.guard import Guard, is_loopback
from fedpeft_client.inference.llama_model import Adapter
from fedpeft_client.inference.model_names import ModelNames
from fedpeft_client.inference.openai_format import AnswerFormat, parse_chat, parse_text
from fedpeft_client.inference.slots import Slot, place, to_empty
from fedpeft_client.inference.text_stream import TextStream
from fedpeft_client.inference.watching import stamp

USER = [{"role": "user", "content": "secret question"}]


def body(**fields: Any) -> bytes:
    return json.dumps({"model": "base", "messages": USER} | fields).encode()


# The key


def test_the_key_is_made_once_and_only_its_owner_can_read_it(tmp_path: Path):
    path = tmp_path / "api.key"
    key = load_api_key(path)

    assert len(key) >= 43
    assert load_api_key(path) == key
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644])
def test_a_key_that_others_can_read_is_refused_without_showing_it(tmp_path: Path, mode: int):
    path = tmp_path / "api.key"
    key = load_api_key(path)
    path.chmod(mode)

    with pytest.raises(StorageError, match="other users") as refused:
        load_api_key(path)
    assert key not in str(refused.value)


def test_a_key_that_can_be_guessed_is_refused(tmp_path: Path):
    path = tmp_path / "api.key"
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY, 0o600)
    os.write(descriptor, b"hospital\n")
    os.close(descriptor)

    with pytest.raises(StorageError, match="no key of 32 characters"):
        load_api_key(path)


# Who may ask


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"host": "attacker.example"},
        {"host": "127.0.0.1.attacker.example:8484"},
        {"host": "localhost@attacker.example"},
        {"host": "[::1"},
        {"host": "localhost:8484", "origin": "https://attacker.example"},
        {"host": "localhost:8484", "origin": "http://localhost:3000"},
        {"host": "localhost:8484", "origin": "null"},
        {"host": "localhost:8484", "origin": "http://["},
        {"host": "localhost:8484", "sec-fetch-site": "cross-site"},
    ],
)
def test_pages_of_other_sites_are_refused_on_this_machine(headers: dict[str, str]):
    refusal = Guard(key=None).refusal(headers)

    assert refusal is not None and refusal.status == 403


@pytest.mark.parametrize("host", ["localhost:8484", "127.0.0.1", "[::1]:8484", "LOCALHOST:1"])
def test_programs_on_this_machine_need_no_key(host: str):
    assert Guard(key=None).refusal({"host": host}) is None


@pytest.mark.parametrize("shown", [None, "", "Bearer ", "Bearer wrong", "Basic right", "right"])
def test_a_wrong_key_is_refused_from_other_machines(shown: str | None):
    headers = {"host": "box.hospital:8484"} | ({} if shown is None else {"authorization": shown})
    refusal = Guard(key="right").refusal(headers)

    assert refusal is not None and refusal.status == 401
    assert Guard(key="right").refusal(headers | {"authorization": "Bearer right"}) is None


def test_only_addresses_of_this_machine_count_as_such():
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.7", "box.hospital", "")))


# Requests


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b"", "no JSON"),
        (b"{", "no JSON"),
        (b"\xff\xfe", "no JSON"),
        (body().decode().encode("utf-16"), "no JSON"),
        (b"\xef\xbb\xbf" + body(), "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b"[]", "no JSON object"),
        (b"{}", "model"),
        (body(messages=[]), "messages"),
        (body(messages="hello"), "messages"),
        (body(messages=[{"role": "nurse", "content": "secret"}]), "messages.0.role"),
        (body(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), "content"),
        (body(messages=[{"role": "user", "content": [{"type": "text"}]}]), "a part has no text"),
        (body(max_tokens=0), "max_tokens"),
        (body(max_tokens="many"), "max_tokens"),
        (body(temperature=3), "temperature"),
        (body(top_p=0), "top_p"),
        (body(stop=["a"] * 9), "stop"),
        (body(n=2), "n: leave it out"),
        (body(tools=[{"type": "function"}]), "tools"),
        (body(response_format={"type": "json_object"}), "response_format"),
        (body(frequency_penalty=0.5), "frequency_penalty"),
    ],
)
def test_a_request_that_cannot_be_used_is_refused_and_not_quoted(data: bytes, named: str):
    with pytest.raises(BadRequest) as refused:
        parse_chat(data)
    assert named in str(refused.value)
    assert "secret" not in str(refused.value)


def test_what_asks_for_nothing_of_what_is_not_done_is_accepted():
    harmless = {"n": 1, "tools": [], "logprobs": False, "frequency_penalty": 0.0, "user": "x"}
    request = parse_chat(body(**harmless, response_format={"type": "text"}))

    assert request.turns() == USER


def test_limits_of_tokens_are_those_of_the_server_whatever_is_asked_for():
    def asked(**fields: int) -> int | None:
        return parse_chat(body(**fields)).sampling(100).max_tokens

    assert asked() == 100
    assert asked(max_tokens=500) == asked(max_completion_tokens=500) == 100
    assert asked(max_tokens=7) == asked(max_completion_tokens=7, max_tokens=500) == 7


def test_text_in_parts_is_joined_and_a_developer_is_a_system_turn():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    turns = parse_chat(body(messages=[{"role": "developer", "content": parts}, *USER])).turns()

    assert turns == [{"role": "system", "content": "ab"}, *USER]


def test_a_text_request_has_one_prompt():
    one = parse_text(json.dumps({"model": "base", "prompt": ["x"]}).encode())

    assert one.prompt == ["x"]
    for several in (["x", "y"], [1, 2, 3], [], None):
        with pytest.raises(BadRequest, match="prompt cannot be used: give one text"):
            parse_text(json.dumps({"model": "base", "prompt": several}).encode())


def test_an_answer_says_what_it_took():
    last = Piece("", "stop", Usage(prompt=5, cached=2, answer=3))
    usage = AnswerFormat("base", chat=True).whole("text", last)["usage"]

    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (5, 3, 8)


# Names


def test_names_of_models_lead_to_versions():
    names = ModelNames("northfield")

    assert names.version("base") == "base"
    assert names.version("northfield") is None
    assert names.version("northfield@round-7") == "round-7"
    assert names.shown("round-7") == "northfield@round-7"


@pytest.mark.parametrize(
    "asked", ["", "round-7", "southfield", "southfield@round-7", "northfield@"]
)
def test_names_of_other_clinics_are_refused(asked: str):
    with pytest.raises(UnknownAdapter):
        ModelNames("northfield").version(asked)


def test_an_adapter_cannot_take_the_name_of_the_base(tmp_path: Path):
    with pytest.raises(ValueError, match="'base'"):
        Catalogue(adapters={"base": tmp_path})
    with pytest.raises(ValueError, match="'round-1'"):
        Catalogue(default="round-1")


# Text


@given(text=st.text(max_size=40), stop=st.text(min_size=1, max_size=4), size=st.integers(1, 5))
def test_text_comes_whole_however_its_bytes_are_cut_and_ends_before_a_stop(
    text: str, stop: str, size: int
):
    data = text.encode()
    stream = TextStream([stop])
    got = "".join(stream.feed(data[at : at + size]) for at in range(0, len(data), size))
    got += stream.finish()

    assert got == text.partition(stop)[0]
    assert stream.stopped == (stop in text)


@given(text=st.text(max_size=40))
def test_without_stops_nothing_but_half_characters_is_held_back(text: str):
    stream = TextStream([])

    assert "".join(stream.feed(each.encode()) for each in text) == text


# Slots

ONE, TWO = Adapter("same", 1), Adapter("same", 1)


def test_what_was_read_under_an_adapter_is_kept_for_that_very_one_only():
    slot = Slot(0, adapter=ONE, tokens=[1, 2, 3])

    assert slot.kept([1, 2, 3, 4], ONE) == 3
    assert slot.kept([1, 2, 3], ONE) == 2  # the last one's prediction is needed
    assert slot.kept([1, 9, 3, 4], ONE) == 1
    assert slot.kept([1, 2, 3, 4], TWO) == slot.kept([1, 2, 3, 4], None) == 0


def test_the_slot_that_knows_most_of_the_prompt_is_chosen_then_an_empty_then_the_oldest():
    knows = Slot(0, adapter=ONE, tokens=[1, 2], used=3)
    other = Slot(1, adapter=ONE, tokens=[7], used=1)
    empty = Slot(2)

    assert place([other, empty, knows], [1, 2, 3], ONE) == (knows, 2)
    assert place([other, empty, knows], [1, 2, 3], TWO) == (empty, 0)
    assert place([knows, other], [5, 6], TWO) == (other, 0)


def test_only_idle_slots_are_emptied_and_only_as_many_as_needed():
    running = Slot(0, reserved=50, tokens=[1] * 10, used=9)
    old = Slot(1, tokens=[1] * 30, used=1)
    young = Slot(2, tokens=[1] * 20, used=2)
    mine = Slot(3)
    slots = [running, old, young, mine]

    assert to_empty(slots, 128, 28, mine) == []
    assert to_empty(slots, 128, 29, mine) == [old]
    assert to_empty(slots, 128, 78, mine) == [old, young]
    assert to_empty(slots, 128, 79, mine) is None


# Changes on the disk


def test_a_change_in_a_folder_is_seen_and_a_missing_folder_is_empty(tmp_path: Path):
    folder = tmp_path / "adapters"
    assert stamp(folder) == ()
    folder.mkdir()
    before = stamp(folder)
    (folder / "round-1").mkdir()

    assert stamp(folder) != before


# Pieces on their way


@given(texts=st.lists(st.text(max_size=3), min_size=1, max_size=12), first=st.integers(0, 12))
def test_gathered_pieces_are_the_answer_whole_and_in_order(texts: list[str], first: int):
    usage = Usage(3, 0, len(texts))
    pieces = [Piece(text) for text in texts[:-1]] + [Piece(texts[-1], "length", usage)]
    answer = QueuedAnswer("round-1")
    for piece in pieces[:first]:
        answer.give(piece)
    found: list[Piece] = []
    for piece in answer.gathered(0) if first else ():
        found.append(piece)
        for late in pieces[first:]:
            answer.give(late)
        first = len(pieces)

    if found:
        assert "".join(piece.text for piece in found) == "".join(texts)
        assert [piece.finished for piece in found[:-1]] == [None] * (len(found) - 1)
        assert (found[-1].finished, found[-1].usage) == ("length", usage)


def test_gathering_waits_for_nothing_at_the_beginning_and_at_the_end():
    answer = QueuedAnswer("base")
    answer.give(Piece("a"))
    gathered = answer.gathered(pause_s=3600)
    assert next(gathered) == Piece("a")
    threading.Timer(0.05, lambda: answer.give(Piece("b", "stop"))).start()
    assert list(gathered) == [Piece("b", "stop")]


def test_what_came_before_a_failure_is_gathered_and_then_the_failure_told():
    answer = QueuedAnswer("base")
    answer.give(Piece("a"))
    answer.give(Piece("b"))
    answer.fail()
    gathered = answer.gathered(0)
    assert next(gathered) == Piece("ab")
    with pytest.raises(InferenceError, match="was stopped"):
        next(gathered)
