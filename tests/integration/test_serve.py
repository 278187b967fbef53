"""``fedpeft-client serve`` as programs meet it: with OpenAI's own client, and with bad ones."""

import contextlib
import datetime
import http.client
import json
import os
import queue
import re
import resource
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from openai import APIStatusError, OpenAI

from fedpeft.errors import ConfigError
from fedpeft_client.inference.serving import tls_context
from tests.client.inference_boxes import arrive, make_box

TURNS: list[Any] = [{"role": "user", "content": "What is the dose of Levothyroxine?"}]
PROMPT = "The patient"
SECRET = "zebra-crossing-4711"
START_S = 120


class Served:
    """A running server, its address, and what it printed."""

    def __init__(self, box: Path, *options: str) -> None:
        command = [sys.executable, "-m", "fedpeft_client", "serve", str(box), *options]
        self.box = box
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self.lines: list[str] = []
        self._came: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.url = self.said(r" on (https?://\S+/v1)")

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            self._came.put(line)
        self._came.put(None)

    def said(self, pattern: str) -> str:
        """Wait until it has printed something, and return the group."""
        end = time.monotonic() + START_S
        while (line := self._came.get(timeout=max(0.1, end - time.monotonic()))) is not None:
            if found := re.search(pattern, line):
                return found[1]
        raise AssertionError("".join(self.lines))

    def client(self, key: str = "none") -> OpenAI:
        return OpenAI(base_url=self.url, api_key=key, max_retries=0, timeout=60)

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.url.removeprefix("http://").removesuffix("/v1").rpartition(":")
        return host, int(port)

    def stop(self, signals: int = 1) -> int:
        for _ in range(signals):
            self.process.send_signal(signal.SIGINT)
            time.sleep(0.3)
        return self.ended()

    def ended(self) -> int:
        """Wait for its end, and return the exit code."""
        code = self.process.wait(START_S)
        self._reader.join(START_S)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One server for all tests that leave it as it was; rounds 1 to 3, the last one in use."""
    server = Served(
        make_box(tmp_path_factory.mktemp("serve") / "box", rounds=3, parallel=2, waiting=2),
        "--listen",
        "127.0.0.1:0",
    )
    yield server
    server.stop(2)


Serve = Callable[..., Served]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Start a server of a box of its own: ``serve(*options, **inference)``."""
    running: list[Served] = []

    def start(*options: str, **inference: Any) -> Served:
        box = make_box(tmp_path / "box", **inference)
        running.append(Served(box, *(options or ("--listen", "127.0.0.1:0"))))
        return running[-1]

    yield start
    for server in running:
        server.stop(2) if server.process.poll() is None else server.ended()


def ask(server: Served, **changes: Any) -> Any:
    create: Callable[..., Any] = server.client().chat.completions.create
    return create(**({"model": "northfield", "messages": TURNS, "max_tokens": 16} | changes))


def long_stream(server: Served, model: str = "northfield@round-3") -> Any:
    """Begin an answer of 200 tokens, and wait for its first one."""
    stream = server.client().completions.create(
        model=model, prompt=PROMPT, max_tokens=200, stream=True
    )
    next(iter(stream))
    return stream


def request(server: Served, path: str, body: bytes = b"", **headers: str) -> tuple[int, str]:
    """Send a request as it is, and return the status and the error's code."""
    connection = http.client.HTTPConnection(*server.address, timeout=60)
    with contextlib.closing(connection):
        connection.request("POST" if body else "GET", path, body or None, headers)
        response = connection.getresponse()
        content = json.loads(response.read())
        return response.status, content.get("error", {}).get("code", "")


JSON = {"Content-Type": "application/json"}


# What is refused


@pytest.mark.parametrize(
    ("changes", "status", "code"),
    [
        ({"model": "northfield@round-9"}, 404, "model_not_found"),
        ({"model": "southfield"}, 404, "model_not_found"),
        ({"messages": [{"role": "user", "content": f"{SECRET} " * 99}]}, 400,
         "context_length_exceeded"),
        ({"temperature": -1}, 400, "invalid_value"),
        ({"n": 3}, 400, "invalid_value"),
        ({"messages": []}, 400, "invalid_value"),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_is_refused_with_a_status_that_says_so(
    served: Served, changes: dict[str, Any], status: int, code: str
):
    with pytest.raises(APIStatusError) as refused:
        ask(served, **changes)

    assert (refused.value.status_code, refused.value.code) == (status, code)


@pytest.mark.parametrize(
    ("path", "body", "headers", "status"),
    [
        ("/v1/chat/completions", b"{no json", JSON, 400),
        ("/v1/chat/completions", b"{}", {"Content-Type": "text/plain"}, 415),
        ("/v1/chat/completions", b"", {}, 405),
        ("/v1/models", b"{}", JSON, 405),
        ("/v1/models/base", b"{}", JSON, 405),
        ("/v1/models/southfield", b"", {}, 404),
        ("/v1/models", b"", {"A": "b" * 9000}, 431),
        ("/", b"", {}, 404),
        ("/slots", b"", {}, 404),
        ("/v1/models", b"", {"Host": "attacker.example"}, 403),
        ("/v1/models", b"", {"Origin": "https://attacker.example"}, 403),
        ("/v1/chat/completions", b"x" * (1 << 20) + b"y", JSON, 413),
    ],
)
def test_a_request_that_is_none_is_refused(
    served: Served, path: str, body: bytes, headers: dict[str, str], status: int
):
    assert request(served, path, body, **headers)[0] == status


def test_more_requests_than_places_are_refused_at_once_and_the_others_answered(served: Served):
    def status(_: int) -> int:
        fields = {"model": "northfield@round-3", "prompt": PROMPT, "max_tokens": 200}
        return request(served, "/v1/completions", json.dumps(fields).encode(), **JSON)[0]

    with ThreadPoolExecutor(24) as pool:
        found = list(pool.map(status, range(24)))

    assert set(found) == {200, 503}
    assert found.count(200) >= 4  # two that run and two that wait


def test_a_port_that_is_taken_is_refused_before_anything_is_loaded(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        box = make_box(tmp_path / "box", rounds=0)
        done = subprocess.run(
            [sys.executable, "-m", "fedpeft_client", "serve", str(box), "--listen", address],
            capture_output=True,
            text=True,
            timeout=START_S,
        )

    assert done.returncode == 9
    assert f"cannot listen on {address}" in done.stderr


def test_a_disk_that_fills_up_during_conversion_is_told_and_leaves_nothing(tmp_path: Path):
    box = make_box(tmp_path / "box", rounds=1)
    most = 1 << 20  # bytes of a file; the base model takes five times as many
    done = subprocess.run(
        ["prlimit", f"--fsize={most}", sys.executable, "-m", "fedpeft_client", "serve", str(box)],
        capture_output=True,
        text=True,
        timeout=START_S,
    )

    assert done.returncode == 11
    assert f"cannot write {box / 'inference' / 'base-'}" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path for path in (box / "inference").rglob("*") if path.is_file()] == []


def test_what_is_refused_says_what_can_be_asked_for_by_the_names_of_the_server(served: Served):
    for model in ("northfield@round-9", "southfield"):
        with pytest.raises(APIStatusError, match="base, northfield, northfield@round-1, "):
            ask(served, model=model)
        with pytest.raises(APIStatusError, match="base, northfield, northfield@round-1, ") as other:
            served.client().models.retrieve(model)
        assert (other.value.status_code, other.value.code) == (404, "model_not_found")


# What answers


def test_the_official_client_lists_models_and_gets_answers_of_each(served: Served):
    client = served.client()
    names = [model.id for model in client.models.list()]
    answers = {name: ask(served, model=name) for name in names}
    texts = {name: answer.choices[0].message.content for name, answer in answers.items()}

    assert names == ["base", "northfield", *(f"northfield@round-{n}" for n in (1, 2, 3))]
    assert answers["northfield"].model == "northfield@round-3"
    assert texts["northfield"] == texts["northfield@round-3"]
    assert len({texts[name] for name in names}) == 4


def test_the_official_client_looks_up_each_model(served: Served):
    client = served.client()
    for name in ("base", "northfield", "northfield@round-2"):
        assert client.models.retrieve(name).id == name


def test_other_methods_are_told_which_ones_there_are(served: Served):
    url = served.url
    assert httpx.head(f"{url}/models").status_code == 200
    assert httpx.options(f"{url}/models").headers["allow"] == "GET, HEAD"
    assert httpx.get(f"{url}/completions").headers["allow"] == "POST"


def test_how_long_a_prompt_and_its_answer_may_be_is_said_at_the_start(serve: Serve):
    server = serve(rounds=0, context=8192)
    told = "".join(server.lines)
    assert "256 tokens together: the base model was trained on no more" in told
    assert "inference.context = 8192" in told


def test_a_stream_has_the_same_text_and_says_what_it_took(served: Served):
    whole = ask(served, model="northfield@round-1")
    chunks = list(
        ask(served, model="northfield@round-1", stream=True, stream_options={"include_usage": True})
    )
    text = "".join(it.choices[0].delta.content or "" for it in chunks if it.choices)

    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason


def test_a_text_is_continued_by_the_model_that_is_named(served: Served):
    def told(model: str) -> str:
        done = served.client().completions.create(model=model, prompt=PROMPT, max_tokens=16)
        return done.choices[0].text

    assert len({told("base"), told("northfield@round-1"), told("northfield@round-2")}) == 3


def test_answers_of_several_adapters_at_once_are_those_of_each_alone(served: Served):
    names = ["base", "northfield@round-1", "northfield@round-2", "northfield@round-3"]

    def told(name: str) -> str:
        return ask(served, model=name, max_tokens=100).choices[0].message.content

    alone = [told(name) for name in names]
    with ThreadPoolExecutor(len(names)) as pool:
        assert list(pool.map(told, names)) == alone


# Clients that behave badly


def test_a_client_that_goes_away_gives_its_place_to_others(serve: Serve):
    server = serve(parallel=1, waiting=0)
    for _ in range(3):
        long_stream(server, "northfield@round-2").close()
        end = time.monotonic() + 60
        while True:  # a place is free again as soon as the server has seen that it left
            try:
                assert ask(server, max_tokens=1).choices
                break
            except APIStatusError as error:
                assert error.status_code == 503
                assert time.monotonic() < end
                time.sleep(0.05)


HALF_HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: loc"
HALF_BODY = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
    b"Content-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
)


@pytest.mark.parametrize("begun", [HALF_HEAD, HALF_BODY])
def test_a_thousand_connections_opened_and_left_do_not_keep_others_out(
    served: Served, begun: bytes
):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2048:
        pytest.skip(f"this machine allows {hard} open files a process")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    left: list[socket.socket] = []
    try:
        for number in range(1000):
            left.append(socket.create_connection(served.address, timeout=60))
            if number % 2:  # half of them begin a request
                left[-1].sendall(begun)
        began = time.monotonic()
        assert ask(served).choices
        assert time.monotonic() - began < 30
    finally:
        for each in left:
            each.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


TINY_PARTS = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
    b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
)


def test_bodies_sent_a_byte_at_a_time_do_not_keep_others_waiting(served: Served):
    def attack() -> None:
        for _ in range(20):
            # Refused in the middle of it, or not taken: both are well.
            with (
                contextlib.suppress(OSError),
                socket.create_connection(served.address, timeout=5) as one,
            ):
                one.sendall(TINY_PARTS + b"1\r\nx\r\n" * 200_000)

    attackers = [threading.Thread(target=attack) for _ in range(4)]
    for each in attackers:
        each.start()
    try:
        time.sleep(0.5)
        began = time.monotonic()
        assert request(served, "/v1/models")[0] == 200
        assert ask(served, max_tokens=1).choices
        assert time.monotonic() - began < 20
    finally:
        for each in attackers:
            each.join()


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"\x16\x03\x01\x00\r\n\r\n", 400),
        (TINY_PARTS + b"zzz\r\n", 400),
        (TINY_PARTS + b"1\r\nx\r\n" * 400, 400),
        (b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n" + b"a:b\r\n" * 50_000, 431),
    ],
)
def test_what_is_no_request_gets_an_error_as_programs_read_it(
    served: Served, data: bytes, status: int
):
    with socket.create_connection(served.address, timeout=60) as connection:
        connection.sendall(data)
        response = http.client.HTTPResponse(connection)
        response.begin()
        error = json.loads(response.read(int(response.headers["content-length"])))["error"]

    assert response.status == status
    assert error["code"] == "unreadable_request"


def test_rubbish_after_an_answer_ends_the_connection_and_nothing_is_printed(served: Served):
    before = len(served.lines)
    wrong = TINY_PARTS.replace(b"/v1/chat/completions", b"/nowhere")
    with socket.create_connection(served.address, timeout=60) as connection:
        connection.sendall(wrong)
        response = http.client.HTTPResponse(connection)
        response.begin()
        assert response.status == 404
        assert b"unknown_url" in response.read()
        with contextlib.suppress(ConnectionResetError):
            connection.sendall(b"zzz\r\n")
            assert connection.recv(65536) == b""

    assert ask(served, max_tokens=1).choices
    assert served.lines[before:] == []


# Keys


def test_beyond_this_machine_a_key_is_made_and_asked_for(serve: Serve):
    server = serve("--listen", "0.0.0.0:0")
    key = (server.box / "api.key").read_text().strip()
    server.url = server.url.replace("0.0.0.0", "127.0.0.1")

    assert (server.box / "api.key").stat().st_mode & 0o777 == 0o600
    for wrong in ("none", key[:-1], key + "x"):
        with pytest.raises(APIStatusError) as refused:
            server.client(wrong).models.list()
        assert (refused.value.status_code, refused.value.code) == (401, "invalid_api_key")
    assert server.client(key).models.list().data
    assert any("everybody on the network can read" in line for line in server.lines)
    assert key not in "".join(server.lines)


def certified(folder: Path) -> tuple[Path, Path]:
    """Write a certificate of localhost and its private key, and return their files."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    chain, secret = folder / "chain.pem", folder / "key.pem"
    chain.write_bytes(certificate.public_bytes(Encoding.PEM))
    secret.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return chain, secret


def serve_tls(serve: Serve, folder: Path) -> tuple[Served, ssl.SSLContext]:
    """Start a server that encrypts, and return it with what trusts it."""
    chain, secret = certified(folder)
    server = serve(
        "--listen", "127.0.0.1:0", "--certificate", str(chain), "--private-key", str(secret)
    )
    return server, ssl.create_default_context(cafile=chain)


def test_a_certificate_that_is_none_is_refused(tmp_path: Path):
    chain, secret = certified(tmp_path)
    for wrong in (make_box(tmp_path / "box", rounds=0) / "client.toml", tmp_path / "missing"):
        with pytest.raises(ConfigError, match=f"{wrong} .*PEM files that belong together"):
            tls_context(wrong, secret)
    assert tls_context(chain, secret)


def test_with_a_certificate_the_connection_is_encrypted(serve: Serve, tmp_path: Path):
    server, trusted = serve_tls(serve, tmp_path)
    url = server.url.replace("127.0.0.1", "localhost")

    assert url.startswith("https://")
    assert httpx.get(f"{url}/models", verify=trusted).status_code == 200
    with pytest.raises(httpx.HTTPError):
        httpx.get(f"{url}/models".replace("https", "http"))


def test_connections_without_a_handshake_do_not_keep_others_out(serve: Serve, tmp_path: Path):
    server, trusted = serve_tls(serve, tmp_path)
    hard = resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE)[1]
    resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (700, hard))
    url = server.url.replace("127.0.0.1", "localhost")
    before = len(server.lines)
    _, _, port = url.removesuffix("/v1").rpartition(":")
    with contextlib.ExitStack() as left:
        for _ in range(900):
            left.enter_context(socket.create_connection(("127.0.0.1", int(port)), timeout=60))
        assert httpx.get(f"{url}/models", verify=trusted, timeout=30).status_code == 200

    assert server.lines[before:] == []


# Hot swap, end, and what is printed


def test_a_new_round_is_live_without_a_restart_and_running_answers_go_on(serve: Serve):
    server = serve(parallel=2)
    alone = server.client().completions.create(
        model="northfield@round-2", prompt=PROMPT, max_tokens=200
    )
    arrive(server.box, 3)
    end = time.monotonic() + START_S
    told: list[str] = []
    while (model := ask(server, max_tokens=1).model) != "northfield@round-3":
        assert time.monotonic() < end
        running = server.client().completions.create(
            model="northfield@round-2", prompt=PROMPT, max_tokens=200
        )
        told.append(running.choices[0].text)

    assert model == "northfield@round-3"
    assert set(told) == {alone.choices[0].text}


def test_the_first_ctrl_c_lets_answers_finish_and_nothing_said_is_printed(serve: Serve):
    server = serve(parallel=1)
    turns = [{"role": "user", "content": f"{SECRET} is the dose?"}]
    answer = ask(server, messages=turns, max_tokens=60).choices[0].message.content
    stream = long_stream(server, "northfield@round-2")
    server.process.send_signal(signal.SIGINT)
    rest = list(stream)

    assert rest[-1].choices[0].finish_reason == "length"
    assert server.ended() == 0
    printed = "".join(server.lines)
    assert "stopping when the running answers are done" in printed
    assert SECRET not in printed
    assert not answer or answer not in printed
    for path in (server.box / "inference").rglob("*"):
        assert path.is_dir() or path.suffix in {".gguf", ".sha256"}


def test_the_second_ctrl_c_stops_at_once(serve: Serve):
    server = serve(parallel=1)
    stream = long_stream(server, "northfield@round-2")
    idle = socket.create_connection(server.address)
    code = server.stop(2)
    stream.close()
    idle.close()

    assert code == 0
