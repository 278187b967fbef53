"""The parts of the server and the engine that need no model."""

import json
import os
import threading
from pathlib import Path
from typing import Any

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.errors import BadRequest, InferenceError, StorageError, UnknownAdapter
from fedpeft_client.inference.answers import QueuedAnswer
from fedpeft_client.inference.api_key import load_api_key
from fedpeft_client.inference.catalogue import Catalogue
from fedpeft_client.inference.chat_template import ChatTemplate
from fedpeft_client.inference.engine import Message, Piece, Sampling, Usage
from fedpeft_client.inference.frugal import LARGEST_HEAD_BYTES, FrugalConnection
from fedpeft_client.inference.guard import Guard, is_loopback
from fedpeft_client.inference.llama_model import Adapter
from fedpeft_client.inference.model_names import ModelNames
from fedpeft_client.inference.openai_format import AnswerFormat, parse_chat, parse_text
from fedpeft_client.inference.prompts import context_line, cut_messages, unknown
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


# What a connection may bring


CHUNKED = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"


def events(connection: FrugalConnection, data: bytes) -> list[Any]:
    """Return all that a connection reads from ``data``."""
    connection.receive_data(data)
    found: list[Any] = []
    while (event := connection.next_event()) not in (h11.NEED_DATA, h11.PAUSED):
        found.append(event)
    return found


def chunks(size: int, count: int) -> bytes:
    return (f"{size:x}\r\n".encode() + b"x" * size + b"\r\n") * count


@pytest.mark.parametrize(("size", "count"), [(1, 260), (1, 100_000), (100, 1000)])
def test_a_body_in_many_small_parts_is_refused_before_it_is_read(size: int, count: int):
    connection = FrugalConnection()
    with pytest.raises(h11.RemoteProtocolError):
        events(connection, CHUNKED + chunks(size, count))
    status, text = connection.refusal
    assert status == 400
    assert "too many small parts" in text


@pytest.mark.parametrize(("size", "count"), [(1, 250), (256, 4000), (50_000, 20)])
def test_a_body_in_parts_as_programs_send_it_is_read(size: int, count: int):
    found = events(FrugalConnection(), CHUNKED + chunks(size, count) + b"0\r\n\r\n")
    assert sum(len(each.data) for each in found if isinstance(each, h11.Data)) == size * count
    assert isinstance(found[-1], h11.EndOfMessage)


def test_each_request_of_a_connection_may_have_its_own_parts():
    connection = FrugalConnection()
    for _ in range(3):
        events(connection, CHUNKED + chunks(1, 200) + b"0\r\n\r\n")
        connection.send(h11.Response(status_code=200, headers=[("content-length", "0")]))
        connection.send(h11.EndOfMessage())
        connection.start_next_cycle()


def test_a_head_that_is_too_large_is_refused_with_its_own_status():
    connection = FrugalConnection()
    with pytest.raises(h11.RemoteProtocolError):
        events(connection, b"GET / HTTP/1.1\r\n" + b"a:b\r\n" * (LARGEST_HEAD_BYTES // 5))
    assert connection.refusal[0] == 431


# Conversations


@pytest.mark.parametrize(
    ("turns", "named"),
    [
        ([], "no messages"),
        ([("user", "")], "all messages are empty"),
        ([("system", " "), ("user", "\n\t")], "all messages are empty"),
        ([("user", "secret"), ("assistant", "secret")], "the last message is the assistant's"),
    ],
)
def test_a_conversation_that_asks_nothing_is_refused(turns: list[tuple[str, str]], named: str):
    template = ChatTemplate(None, bos="", eos="")
    with pytest.raises(BadRequest, match=named) as refused:
        template.prompt([{"role": role, "content": content} for role, content in turns])
    assert "secret" not in str(refused.value)


def test_a_stop_text_without_end_is_refused():
    with pytest.raises(BadRequest, match="stop has a text of 300 characters"):
        Sampling(stop=("a" * 300,))


@given(st.lists(st.integers(1, 30), min_size=1, max_size=60), st.booleans(), st.integers(8, 200))
def test_as_few_turns_as_possible_are_left_out(lengths: list[int], system: bool, context: int):
    turns: list[Message] = [
        {"role": ("user", "assistant")[at % 2], "content": "x" * length}
        for at, length in enumerate(lengths)
    ]
    first: list[Message] = [{"role": "system", "content": "s" * 5}] if system else []
    most = context - context // 4

    def tokens(messages: Any) -> list[int]:
        return [ord(each) for message in messages for each in message["content"]]

    expected = turns
    while len(tokens([*first, *expected])) > most and len(expected) > 2:
        expected = expected[2:]
    assert cut_messages([*first, *turns], tokens, context) == tokens([*first, *expected])


def test_a_thousand_turns_are_not_made_tokens_of_a_thousand_times():
    turns: list[Message] = [{"role": "user", "content": "x"}] * 999
    asked: list[int] = []

    def tokens(messages: Any) -> list[int]:
        asked.append(len(messages))
        return [0] * len(messages)

    assert len(cut_messages(turns, tokens, 64)) == 47
    assert len(asked) < 15


def test_why_the_context_is_shorter_than_the_setting_is_said():
    assert context_line(4096, 4096).endswith("4096 tokens together (inference.context)")
    assert "512 tokens together: the base model was trained on no more" in context_line(512, 4096)


def test_a_box_without_adapters_says_that_none_has_come_yet():
    assert "no round has arrived on this box yet" in str(unknown("round-1", ["base"], {}))
    assert "no round" not in str(unknown("round-1", ["base", "round-2"], {}))
    assert "cannot be used: torn" in str(unknown("round-1", ["base"], {"round-1": "torn"}))


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
    "asked",
    ["", "round-7", "southfield", "southfield@round-7", "northfield@", "northfield@base"],
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
