"""Calls that are repeated: what they wait for, how long, and what is said meanwhile."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from fedpeft_client.link.patient_calls import MessageLost, PatientCalls, Rejected, RunEnded, Stopped

KEY = ec.generate_private_key(ec.SECP384R1())
REQUEST = httpx.Request("POST", "https://localhost:1/v1/fleet/pull-messages")


def refused(status: int) -> httpx.HTTPStatusError:
    return httpx.HTTPStatusError("", request=REQUEST, response=httpx.Response(status, text="{}"))


class Server:
    """Answers with the troubles in turn, and then with 'done'."""

    def __init__(self, *troubles: Exception) -> None:
        self.troubles = list(troubles)

    def answer(self, _request: str) -> str:
        if self.troubles:
            raise self.troubles.pop(0)
        return "done"


class Waits(threading.Event):
    """A stop event on which nobody waits for long; the waits are counted in ``seconds``."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.seconds.append(timeout)
        return self.is_set()


def calls(told: list[str], stop: threading.Event) -> PatientCalls:
    nobody = cast(Any, None)
    return PatientCalls(
        nobody,
        nobody,
        "localhost:1",
        KEY,
        key_file=Path("key.pem"),
        stop=stop,
        clock=time.time,
        on_outage=told.append,
        on_recovery=lambda: told.append("back"),
    )


@pytest.mark.parametrize(
    ("trouble", "error"),
    [
        (refused(403), RunEnded),
        (refused(412), Rejected),
        (refused(404), MessageLost),
        (ValueError("no protobuf"), MessageLost),
    ],
)
def test_what_the_server_will_never_do_is_not_asked_again(
    trouble: Exception, error: type[Exception]
):
    server, waits = Server(trouble, *[httpx.ConnectError("")] * 3), Waits()
    with pytest.raises(error):
        calls([], waits).call(server.answer, "what is there to do")
    assert len(server.troubles) == 3
    assert waits.seconds == []


def test_a_server_that_fails_for_ever_is_given_up():
    with pytest.raises(Rejected):
        calls([], Waits()).call(Server(*[refused(500)] * 8).answer, "take this")


@pytest.mark.parametrize(
    "trouble",
    [httpx.ConnectError(""), httpx.ReadTimeout(""), httpx.RemoteProtocolError(""), refused(503)],
)
def test_an_outage_is_told_once_and_so_is_its_end(trouble: Exception):
    told: list[str] = []
    made = calls(told, Waits())
    assert made.call(Server(*[trouble] * 5).answer, "take this") == "done"
    assert made.call(Server().answer, "take that") == "done"
    assert len(told) == 2
    assert "localhost:1" in told[0]
    assert told[1] == "back"
    assert made.recovered.is_set()


def test_of_calls_at_the_same_time_one_tells_of_the_outage():
    told: list[str] = []
    made = calls(told, Waits())
    together = threading.Barrier(8)

    def call() -> None:
        server = Server(*[httpx.ConnectError("")] * 3)

        def answer(request: str) -> str:
            together.wait(10)
            return server.answer(request)

        made.call(answer, "take this part")

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len([sentence for sentence in told if sentence != "back"]) == 1
    assert told[-1] == "back"


def pauses(troubles: int) -> list[float]:
    waits = Waits()
    calls([], waits).call(Server(*[httpx.ConnectError("")] * troubles).answer, "take this")
    return waits.seconds


def test_pauses_grow_up_to_half_a_minute_and_no_two_clinics_wait_alike():
    several = [pauses(12) for _ in range(40)]
    for at, waited in enumerate(zip(*several, strict=True)):
        whole = min(0.5 * 2**at, 30.0)
        assert all(whole / 2 <= each <= whole for each in waited)
        # As likely early as late: the mean of forty is near the middle, and few are alike.
        assert 0.62 * whole < sum(waited) / len(waited) < 0.88 * whole
        assert len(set(waited)) > 30


@pytest.mark.parametrize("when", [0, 3])
def test_a_stop_ends_the_waiting(when: int):
    stop = Waits()

    def wait_and_stop(answer: Callable[[str], str]) -> Callable[[str], str]:
        def answered(request: str) -> str:
            if len(stop.seconds) == when:
                stop.set()
            return answer(request)

        return answered

    server = Server(*[httpx.ConnectError("")] * 10)
    with pytest.raises(Stopped):
        calls([], stop).call(wait_and_stop(server.answer), "take this")
    assert len(server.troubles) == 10 - when - 1
