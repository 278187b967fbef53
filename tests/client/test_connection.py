"""The link end to end: a real server, real clients and real sockets in one process."""

import logging
import os
import shutil
import socket
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree

from fedpeft.errors import (
    CertificateRefused,
    ClockSkew,
    ConnectionFailed,
    EnrolmentError,
    FedpeftError,
    TrainingError,
)
from fedpeft.sealing.identity import Identity
from fedpeft.sealing.keyfile import Protection
from fedpeft_client.keys.enrolment import join
from fedpeft_client.link.connection import ConnectionSettings, Event, serve
from fedpeft_client.link.reachability import probe
from fedpeft_client.rounds.answering import describe
from fedpeft_server.enrolments.enrolment import Enrolments
from fedpeft_server.link.superlink import SuperLink, SuperLinkSettings
from fedpeft_server.site.pki import create_authority

HOUR_S = 3600.0
BASE = "f" * 64
CANARY = "CANARY-mrs-example-has-pneumonia"


def blob(data: bytes) -> RecordDict:
    array = Array(dtype="bytes", shape=(len(data),), stype="x", data=data)
    return RecordDict({"blob": ArrayRecord({"x": array})})


def data_of(message: Message) -> bytes:
    return message.content.array_records["blob"]["x"].data


def echo_app() -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message, _context):
        data = data_of(message)
        return Message(blob(bytes(byte ^ 0xFF for byte in data[:8]) + data[8:]), reply_to=message)

    return app


def raising_app(error: Exception) -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(_message, _context):
        raise error

    return app


class Clinic:
    """One client in a thread, with what it reported and what it died of."""

    def __init__(self, app, settings: ConnectionSettings, **options) -> None:
        self.events: list[Event] = []
        self.error: Exception | None = None
        self.stop = threading.Event()
        self._thread = threading.Thread(target=self._serve, args=(app, settings, options))
        self._thread.start()

    def _serve(self, app, settings, options) -> None:
        try:
            serve(app, settings, stop=self.stop, on_event=self.events.append, **options)
        except FedpeftError as error:
            self.error = error

    def kinds(self) -> list[str]:
        return [event.kind for event in self.events]

    def wait_for(self, kind: str, count: int = 1, timeout_s: float = 20.0) -> Event:
        patience = time.monotonic() + timeout_s
        while self.kinds().count(kind) < count:
            assert time.monotonic() < patience, f"no {kind!r} in {self.events}, {self.error!r}"
            time.sleep(0.02)
        return [event for event in self.events if event.kind == kind][-1]

    def finish(self) -> float:
        started = time.monotonic()
        self.stop.set()
        self._thread.join(15)
        assert not self._thread.is_alive()
        return time.monotonic() - started

    def end(self, timeout_s: float = 15.0) -> Exception | None:
        self._thread.join(timeout_s)
        assert not self._thread.is_alive()
        return self.error


class Federation:
    """A server's directory, and everything started in a test."""

    def __init__(self, directory: Path, blank: Path | None = None) -> None:
        self.directory = directory
        (directory / "server").mkdir(mode=0o700)
        if blank is not None:
            shutil.copy(blank, directory / "server")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address = f"localhost:{self.port}"
        self.authority = create_authority(directory / "pki", self.address)
        self.enrolments = self.open_enrolments("enrolment.db")
        self.clinics: list[Clinic] = []

    def open_enrolments(self, name: str) -> Enrolments:
        return Enrolments(
            self.directory / name,
            federation="heart",
            server=self.address,
            ca_pem=self.authority.ca_pem(),
            identity=Identity.generate().public,
        )

    def link(self, **options) -> SuperLink:
        settings = SuperLinkSettings(
            directory=self.directory / "server", host="127.0.0.1", port=self.port, poll_s=0.05
        )
        return SuperLink(settings, self.authority, self.enrolments, **options)

    def join(self, name: str) -> ConnectionSettings:
        file = self.directory / f"{name}.json"
        self.enrolments.create_invitation(name, HOUR_S, fingerprint=BASE).write(file)
        enrolment = join(file, self.directory / name, Protection.none())
        return ConnectionSettings(
            server=enrolment.server,
            key=enrolment.key,
            ca=enrolment.ca,
            poll_s=0.05,
            idle_poll_s=0.05,
        )

    def start(self, app, settings, **options) -> Clinic:
        clinic = Clinic(app, settings, **options)
        self.clinics.append(clinic)
        return clinic


@pytest.fixture(scope="module")
def blank_store(tmp_path_factory) -> Path:
    """An empty message store: to make one takes Flower half a second."""
    directory = tmp_path_factory.mktemp("blank")
    with Federation(directory).link():
        pass
    return directory / "server" / "flower.db"


@pytest.fixture
def federation(tmp_path, blank_store):
    made = Federation(tmp_path, blank_store)
    yield made
    for clinic in made.clinics:
        clinic.finish()


def ask(link: SuperLink, content: RecordDict, message_type: str = "train", timeout_s: float = 30):
    """Send one message to each clinic that is online, and return the replies by clinic."""
    messages = [
        Message(content, node_id, message_type, group_id="7") for node_id in link.connected()
    ]
    replies = link.grid.send_and_receive(messages, timeout=timeout_s)
    return {link.names()[link.grid.node_of(reply)]: reply for reply in replies}


def test_a_megabyte_goes_there_and_back_to_two_clinics(federation):
    arrivals = []
    payload = os.urandom(1 << 20)
    with federation.link(on_arrival=lambda node, _reply: arrivals.append(node)) as link:
        clinics = [federation.start(echo_app(), federation.join(name)) for name in ("anna", "bert")]
        for clinic in clinics:
            clinic.wait_for("connected")
        up, down = link.meter.bytes_up, link.meter.bytes_down

        replies = ask(link, blob(payload))

        assert sorted(replies) == ["anna", "bert"]
        for reply in replies.values():
            data = data_of(reply)
            assert (data[:8], data[8:]) == (bytes(b ^ 0xFF for b in payload[:8]), payload[8:])
        assert sorted(arrivals) == sorted(link.connected())
        # Both clinics fetch; of two equal answers Flower stores the first only.
        assert 2 << 20 < link.meter.bytes_down - down < (2 << 20) + 100_000
        assert 1 << 20 < link.meter.bytes_up - up < (2 << 20) + 100_000
        answered = clinics[0].wait_for("answered")
        assert (answered.message_type, answered.group) == ("train", "7")
        assert answered.bytes_in > 1 << 20


def test_payload_of_repeated_bytes_survives(federation):
    with federation.link() as link:
        federation.start(echo_app(), federation.join("anna")).wait_for("connected")

        reply = ask(link, blob(bytes(12_000_000)))["anna"]

        assert data_of(reply) == b"\xff" * 8 + bytes(11_999_992)


def test_message_types_that_the_clinic_does_not_allow_are_refused(federation):
    called = []
    app = ClientApp()

    @app.query()
    def query(message, _context):
        called.append(message)
        return Message(RecordDict(), reply_to=message)

    with federation.link() as link:
        clinic = federation.start(app, federation.join("anna"))
        clinic.wait_for("connected")

        for message_type in ("query", "train.secret", "evaluate.x"):
            reply = ask(link, blob(b"x"), message_type)["anna"]
            assert reply.error.reason == "refused-by-clinic"
        assert "asks for 'evaluate.x'" in clinic.wait_for("refused", 3).detail
    assert called == []


def test_message_whose_content_differs_from_its_announcement_is_refused(federation):
    called = []
    app = ClientApp()

    @app.query()
    def query(message, _context):
        called.append(message)
        return Message(RecordDict(), reply_to=message)

    with federation.link() as link:
        clinic = federation.start(app, federation.join("anna"))
        clinic.wait_for("connected")
        message = Message(blob(b"x"), next(iter(link.connected())), "query")
        message.metadata.__dict__["_message_id"] = message.object_id
        objects = get_all_nested_objects(message)
        head, tree = remove_content_from_message(message), get_object_tree(message)
        contents = {object_id: each.deflate() for object_id, each in objects.items()}
        head.metadata.__dict__["_message_type"] = "train"
        run_id = link.grid.run.run_id
        session = link._state.start_session(run_id)
        _, missing = link._state.store_message_and_object_tree(head, tree, session)
        for object_id in missing:
            link._state.store_object(run_id, session, object_id, contents[object_id])

        assert "not what its announcement said" in clinic.wait_for("refused").detail
    assert called == []


def test_oversized_message_is_refused(federation):
    with federation.link() as link:
        settings = replace(federation.join("anna"), max_payload_bytes=100_000)
        clinic = federation.start(echo_app(), settings)
        clinic.wait_for("connected")

        reply = ask(link, blob(os.urandom(200_000)))["anna"]

        assert reply.error.reason == "size-limit"
        assert "larger than the 100000 bytes" in clinic.wait_for("refused").detail
        assert ask(link, blob(b"small enough"))["anna"].has_content()


def test_text_of_an_exception_stays_at_home(federation, caplog):
    caplog.set_level(logging.DEBUG)
    with federation.link() as link:
        app = raising_app(ValueError(CANARY))
        clinic = federation.start(app, federation.join("anna"))
        clinic.wait_for("connected")

        reply = ask(link, blob(b"x"))["anna"]
        stored = b"".join(path.read_bytes() for path in (federation.directory / "server").iterdir())

    assert (reply.error.code, reply.error.reason) == (2, "internal-error")
    assert CANARY.encode() not in stored
    assert CANARY not in caplog.text
    assert "ValueError at" in caplog.text
    assert clinic.wait_for("failed").detail == "internal-error"


def test_own_error_tells_the_server_its_reason_and_the_clinic_its_sentence(federation, caplog):
    with federation.link() as link:
        app = raising_app(TrainingError("the disk of this clinic is full"))
        federation.start(app, federation.join("anna")).wait_for("connected")

        reply = ask(link, blob(b"x"))["anna"]

    assert reply.error.reason == "training-failed"
    assert "the disk of this clinic is full" in caplog.text


def test_description_of_a_failure_names_places_and_no_values():
    def deep() -> None:
        raise KeyError(CANARY)

    with pytest.raises(KeyError) as caught:
        deep()

    text = describe(caught.value)
    assert "KeyError at " in text
    assert "test_connection.py:" in text
    assert " deep" in text
    assert CANARY not in text


def test_clinic_that_left_is_reported_with_its_own_node_id(federation):
    with federation.link() as link:
        clinic = federation.start(echo_app(), federation.join("anna"))
        clinic.wait_for("connected")
        (node_id,) = link.connected()
        clinic.finish()
        assert link.connected() == {}

        (reply,) = link.grid.send_and_receive([Message(blob(b"x"), node_id, "train")], timeout=20)

        assert reply.error.code == ErrorCode.NODE_UNAVAILABLE
        assert reply.metadata.src_node_id != node_id
        assert link.grid.node_of(reply) == node_id


def test_client_reconnects_after_a_server_restart_on_the_same_directory(federation):
    with federation.link() as link:
        clinic = federation.start(echo_app(), federation.join("anna"))
        clinic.wait_for("connected")
        names = link.connected()
        assert ask(link, blob(b"first"))["anna"].has_content()
    clinic.wait_for("disconnected")

    with federation.link() as link:
        clinic.wait_for("connected", 2)
        assert link.connected() == names
        assert ask(link, blob(b"second"))["anna"].has_content()

    assert clinic.error is None


def test_client_waits_for_a_server_that_is_not_there_yet(federation):
    with federation.link():
        settings = federation.join("anna")
    clinic = federation.start(echo_app(), settings)
    assert "cannot be reached" in clinic.wait_for("disconnected").detail

    with federation.link() as link:
        clinic.wait_for("connected")
        assert list(link.connected().values()) == ["anna"]


def test_second_process_with_the_same_key_waits_for_the_first_to_go(federation):
    with federation.link():
        settings = federation.join("anna")
        first = federation.start(echo_app(), settings)
        first.wait_for("connected")
        second = federation.start(echo_app(), settings)
        assert "another process" in second.wait_for("waiting").detail
        assert "connected" not in second.kinds()

        first.finish()

        second.wait_for("connected")


def test_stop_is_honoured_within_about_a_second(federation):
    with federation.link():
        connected = federation.start(echo_app(), federation.join("anna"))
        connected.wait_for("connected")
        assert connected.finish() < 2.0
        settings = replace(federation.join("bert"), server="localhost:1")
    lonely = federation.start(echo_app(), settings)
    lonely.wait_for("disconnected")
    assert lonely.finish() < 2.0
    assert lonely.error is None


def test_stop_of_the_server_ends_the_wait_with_what_has_arrived(federation):
    stop, working = threading.Event(), threading.Event()
    app = ClientApp()

    @app.train()
    def train(message, _context):
        working.wait(20)
        return Message(RecordDict(), reply_to=message)

    with federation.link(stop=stop) as link:
        federation.start(app, federation.join("anna")).wait_for("connected")
        threading.Timer(0.5, stop.set).start()
        started = time.monotonic()

        replies = ask(link, blob(b"x"))

        assert replies == {}
        assert time.monotonic() - started < 3
        working.set()


def test_late_reply_is_dropped_and_the_next_round_is_clean(federation):
    slow = threading.Event()
    app = ClientApp()

    @app.train()
    def train(message, _context):
        slow.wait(20)
        return Message(message.content, reply_to=message)

    with federation.link() as link:
        clinic = federation.start(app, federation.join("anna"))
        clinic.wait_for("connected")
        assert ask(link, blob(b"first"), timeout_s=0.5) == {}
        slow.set()

        reply = ask(link, blob(b"second"))["anna"]

        assert data_of(reply) == b"second"


@pytest.mark.parametrize(
    ("offset_s", "direction"),
    [(600, "ahead of"), (60, "ahead of"), (-900, "behind")],
)
def test_wrong_clock_is_named_with_the_difference(federation, offset_s, direction):
    with federation.link():
        settings = federation.join("anna")
        clinic = federation.start(echo_app(), settings, clock=lambda: time.time() + offset_s)

        error = clinic.end()

        assert isinstance(error, ClockSkew)
        (word,) = [word for word in str(error).split() if word.isdigit()]
        assert abs(int(word) - abs(offset_s)) <= 2
        assert f"s {direction} the server's" in str(error)
        with pytest.raises(ClockSkew):
            probe(settings.server, settings.ca, clock=lambda: time.time() + offset_s)


def test_clock_within_tolerance_is_accepted(federation):
    with federation.link():
        clinic = federation.start(
            echo_app(), federation.join("anna"), clock=lambda: time.time() - 250
        )
        clinic.wait_for("connected")


def test_server_of_another_ca_is_refused(federation, tmp_path):
    stranger = create_authority(tmp_path / "stranger", federation.address)
    with federation.link():
        settings = replace(federation.join("anna"), ca=stranger.ca_certificate)

        error = federation.start(echo_app(), settings).end()

        assert isinstance(error, CertificateRefused)
        assert "not issued by the federation's own CA" in str(error)
        with pytest.raises(CertificateRefused):
            probe(settings.server, settings.ca)


def test_certificate_of_another_host_is_refused(federation):
    with federation.link():
        settings = replace(federation.join("anna"), server=f"127.0.0.2:{federation.port}")
    with socket.create_server(("127.0.0.2", 0)) as elsewhere:
        federation.port = elsewhere.getsockname()[1]
    link = federation.link()
    link._settings = replace(link._settings, host="127.0.0.2")
    with link, pytest.raises(CertificateRefused, match=r"not made out to 127\.0\.0\.2"):
        probe(f"127.0.0.2:{federation.port}", settings.ca)


def test_plain_http_server_is_refused(federation):
    def answer(server: socket.socket) -> None:
        connection, _ = server.accept()
        with connection:
            connection.recv(4096)
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=answer, args=(server,))
        thread.start()
        port = server.getsockname()[1]
        with pytest.raises(CertificateRefused, match=r"does not speak TLS 1\.3"):
            probe(f"127.0.0.1:{port}", federation.authority.ca_certificate)
        thread.join()


def test_probe_measures_and_names_an_absent_server(federation):
    ca = federation.authority.ca_certificate
    with federation.link():
        found = probe(federation.address, ca)
        assert found.ok
        assert abs(found.clock_skew_s) < 2
        assert 0 < found.latency_s < 5
    with pytest.raises(ConnectionFailed, match="cannot be reached"):
        probe(federation.address, ca)


def test_clinic_removed_while_connected_is_told_so(federation):
    with federation.link() as link:
        clinic = federation.start(echo_app(), federation.join("anna"))
        clinic.wait_for("connected")

        federation.enrolments.remove("anna")

        error = clinic.end()
        assert isinstance(error, EnrolmentError)
        assert "does not know this machine's key" in str(error)
        assert link.connected() == {}


def test_key_that_the_server_never_saw_is_told_so(federation):
    with federation.link():
        settings = federation.join("anna")
    federation.enrolments = federation.open_enrolments("another.db")
    with federation.link():
        assert isinstance(federation.start(echo_app(), settings).end(), EnrolmentError)


def test_missing_or_open_key_is_told_before_anything_is_sent(federation):
    with federation.link():
        settings = federation.join("anna")
    settings.key.chmod(0o644)
    with pytest.raises(EnrolmentError, match="chmod 600"):
        serve(echo_app(), settings, stop=threading.Event())
    settings.key.unlink()
    with pytest.raises(EnrolmentError, match="join the federation first"):
        serve(echo_app(), settings, stop=threading.Event())


def test_proxies_of_the_environment_are_not_used(federation, monkeypatch):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("SSL_CERT_FILE", "/dev/null")
    with federation.link() as link:
        federation.start(echo_app(), federation.join("anna")).wait_for("connected")

        assert ask(link, blob(b"x"))["anna"].has_content()


def test_state_of_a_clinic_lasts_for_a_run_and_no_longer(federation):
    app = ClientApp()

    @app.train()
    def train(message, context):
        count = context.state["n"]["n"] + 1 if "n" in context.state else 1
        context.state["n"] = ConfigRecord({"n": count})
        return Message(
            RecordDict({"n": ConfigRecord({"n": count, "who": context.node_config["who"]})}),
            reply_to=message,
        )

    with federation.link() as link:
        settings = replace(federation.join("anna"), node_config={"who": "anna"})
        clinic = federation.start(app, settings)
        clinic.wait_for("connected")
        counts = [ask(link, blob(b"x"))["anna"].content["n"]["n"] for _ in range(2)]
    with federation.link() as link:
        clinic.wait_for("connected", 2)
        after = ask(link, blob(b"x"))["anna"].content["n"]

    assert counts == [1, 2]
    assert (after["n"], after["who"]) == (1, "anna")
