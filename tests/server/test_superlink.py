"""The server as an outsider, a member and the operator meet it, over real sockets."""

import base64
import json
import logging
import os
import socket
import sqlite3
import ssl
import threading
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.message_pb2 import Metadata, ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.serverapp import ServerApp
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE as PROTOBUF

from fedpeft.errors import ConnectionFailed, FederationError, PortInUse, StorageError
from fedpeft.sealing.identity import Identity, PublicIdentity
from fedpeft.sealing.possession import prove_possession
from fedpeft_server.enrolments.enrolment import Enrolments
from fedpeft_server.enrolments.rate_limit import EnrolmentLimit, RateLimiter, network_of
from fedpeft_server.enrolments.refusal import InvitationRefused
from fedpeft_server.link.public_door import FLEET_PATHS
from fedpeft_server.link.superlink import SuperLink, SuperLinkSettings
from fedpeft_server.site.pki import Authority, create_authority

HOUR_S = 3600.0
BASE = "f" * 64


def new_key() -> str:
    return (
        ec.generate_private_key(ec.SECP384R1())
        .public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        .decode()
    )


@pytest.fixture(scope="module")
def authority(tmp_path_factory) -> Authority:
    return create_authority(tmp_path_factory.mktemp("pki") / "pki", "localhost:1")


def enrolling(token: str) -> dict[str, str]:
    """Return what a new clinic sends to enrol."""
    identity, key = Identity.generate(), new_key()
    proof = prove_possession(identity, federation="heart", token=token, public_key_pem=key)
    return {
        "token": token,
        "public_key": key,
        "identity": identity.public.to_text(),
        "proof": proof,
    }


def enrolments_in(directory: Path, authority: Authority) -> Enrolments:
    return Enrolments(
        directory / "enrolment.db",
        federation="heart",
        server="s:1",
        ca_pem=authority.ca_pem(),
        identity=Identity.generate().public,
    )


def settings_in(directory: Path, **changes) -> SuperLinkSettings:
    return replace(SuperLinkSettings(directory=directory, host="127.0.0.1", port=0), **changes)


@pytest.fixture(scope="module")
def link(tmp_path_factory, authority):
    directory = tmp_path_factory.mktemp("server")
    enrolments = enrolments_in(directory, authority)
    settings = settings_in(directory, max_request_bytes=100_000, max_message_bytes=150_000)
    with SuperLink(settings, authority, enrolments) as running:
        yield running


@pytest.fixture
def tmp_path(tmp_path, link) -> Path:
    """A directory with an empty message store: to make one takes Flower half a second."""
    with (
        closing(sqlite3.connect(link._settings.directory / "flower.db")) as made,
        closing(sqlite3.connect(tmp_path / "flower.db")) as copy,
    ):
        made.backup(copy)
        copy.execute("DELETE FROM node")
        copy.commit()
    return tmp_path


@pytest.fixture(scope="module")
def member(link) -> str:
    token = link._enrolments.create_invitation("anna", HOUR_S, fingerprint=BASE).token
    sent = enrolling(token)
    link._enrol(**sent)
    key = sent["public_key"]
    return base64.b64encode(key.encode()).decode()


class Caller:
    """Sends raw requests, so that no library tidies a path or a header up first."""

    def __init__(self, link: SuperLink, authority: Authority) -> None:
        self._port = link.port
        self._tls = ssl.create_default_context(cafile=str(authority.ca_certificate))

    def raw(self, request: bytes) -> bytes:
        with (
            socket.create_connection(("127.0.0.1", self._port), timeout=10) as plain,
            self._tls.wrap_socket(plain, server_hostname="localhost") as tls,
        ):
            tls.sendall(request)
            answer = b""
            while part := tls.recv(65536):
                answer += part
        return answer

    def __call__(
        self, method: str, target: str, body: bytes = b"", **headers: str
    ) -> tuple[int, bytes]:
        lines = [f"{method} {target} HTTP/1.1", "Host: localhost", "Connection: close"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        if body and "Transfer_Encoding" not in headers:
            lines.append(f"Content-Length: {len(body)}")
        answer = self.raw("\r\n".join([*lines, "", ""]).encode() + body)
        head, _, content = answer.partition(b"\r\n\r\n")
        return int(head.split()[1]), content


@pytest.fixture(scope="module")
def call(link, authority) -> Caller:
    return Caller(link, authority)


def enrol(call, **document):
    status, content = call("POST", "/v1/enrol", json.dumps(document).encode())
    return status, json.loads(content)


@pytest.fixture
def fresh_limit(link, monkeypatch):
    door = link._listener._server.config.app
    monkeypatch.setattr(door, "_limiter", RateLimiter(1000, 60))


def test_health_answers_anyone(call):
    assert call("GET", "/health") == (200, b'{"status": "ok"}')


@pytest.mark.parametrize(
    "target",
    [
        "/v1/control/list-nodes",
        "/v1/control/start-run",
        "/v1/runtime/acquire-task",
        "/v1/runtime/pull-messages",
        "/v1/fleet/register-node",
        "/v1/fleet/unregister-node",
        "/v1/fleet/get-fab",
        "/v1/fleet/../control/list-nodes",
        "//v1/fleet/../control/list-nodes",
        "/v1/fleet/%2e%2e/control/list-nodes",
        "/v1/fleet/..%2fcontrol/list-nodes",
        "/v1/%63ontrol/list-nodes",
        "/v1/control/list-nodes?/v1/fleet/pull-messages",
        "/v1/control/list-nodes#/health",
        "/health/../v1/control/list-nodes",
        "http://localhost/v1/control/list-nodes",
        "/v1/fleet/pull-messages/",
        "/v1/fleet/pull-messages;x",
        "/V1/FLEET/pull-messages",
        "/docs",
        "/openapi.json",
        "/",
    ],
)
def test_nothing_but_the_calls_of_a_clinic_exists_even_for_a_member(call, member, target):
    for method in ("POST", "GET"):
        status, _ = call(method, target, Flwr_Public_Key=member, Content_Type=PROTOBUF)
        assert status == 404


@pytest.mark.parametrize("path", sorted(FLEET_PATHS))
def test_stranger_is_turned_away_before_flower_reads_a_byte(call, path):
    stranger = base64.b64encode(new_key().encode()).decode()

    for headers in ({}, {"Flwr_Public_Key": "%%%"}, {"Flwr_Public_Key": stranger}):
        status, content = call("POST", path, b"\xff" * 10, Content_Type=PROTOBUF, **headers)
        assert (status, json.loads(content)) == (401, {"reason": "not-enrolled"})


@pytest.mark.parametrize("path", sorted(FLEET_PATHS - {"/v1/fleet/push-messages"}))
def test_members_key_without_its_signature_is_no_identity(call, member, path):
    status, _ = call("POST", path, Flwr_Public_Key=member, Content_Type=PROTOBUF)

    assert status == 401


def test_declared_body_over_the_cap_is_refused_unread(call, member):
    status, _ = call(
        "POST", "/v1/fleet/push-object", Flwr_Public_Key=member, Content_Length="100001"
    )

    assert status == 413


def test_chunked_body_over_the_cap_is_refused(call, member):
    chunk = b"8000\r\n" + bytes(0x8000) + b"\r\n"

    status, _ = call(
        "POST",
        "/v1/fleet/push-object",
        chunk * 4 + b"0\r\n\r\n",
        Flwr_Public_Key=member,
        Transfer_Encoding="chunked",
    )

    assert status == 413


def test_lying_about_the_length_does_not_stop_the_server(call, member):
    for length in ("-1", "1e9", "1, 2"):
        call("POST", "/v1/fleet/push-object", Flwr_Public_Key=member, Content_Length=length)

    assert call("GET", "/health")[0] == 200


def push_request(node_id: int, *sources: int) -> bytes:
    return PushMessagesRequest(
        node=Node(node_id=node_id),
        messages_list=[
            ProtoMessage(metadata=Metadata(run_id=1, src_node_id=source)) for source in sources
        ],
        message_object_trees=[ObjectTree(object_id="0" * 64) for _ in sources],
    ).SerializeToString()


@pytest.mark.parametrize("sources", [(2,), (), (1, 1), (1, 2)])
def test_reply_in_another_clinics_name_is_refused(call, member, sources):
    status, _ = call(
        "POST",
        "/v1/fleet/push-messages",
        push_request(1, *sources),
        Flwr_Public_Key=member,
        Content_Type=PROTOBUF,
    )

    assert status == 400


def test_honest_reply_gets_as_far_as_the_signature_check(call, member):
    status, _ = call(
        "POST",
        "/v1/fleet/push-messages",
        push_request(1, 1),
        Flwr_Public_Key=member,
        Content_Type=PROTOBUF,
    )

    assert status == 401


def test_enrolling_answers_who_one_is_and_registers_the_node(link, call, fresh_limit):
    token = link._enrolments.create_invitation("bert", HOUR_S, fingerprint=BASE).token

    sent = enrolling(token)

    status, answer = enrol(call, **sent)

    (clinic,) = (each for each in link._enrolments.clinics() if each.name == "bert")
    expected = {
        "clinic": "bert",
        "federation": "heart",
        "keys_expire": clinic.keys_expire.isoformat(timespec="seconds"),
        "identity_expires": clinic.identity_expires.isoformat(timespec="seconds"),
    }
    assert (status, answer) == (200, expected)
    node = next(node for node, name in link.names().items() if name == "bert")
    assert link.identities()[node] == PublicIdentity.from_text(sent["identity"])
    assert link.identities().keys() == link.names().keys()
    assert "bert" not in link.connected().values()


def test_enrolment_refusals_are_told_apart(link, call, fresh_limit):
    used = link._enrolments.create_invitation("carl", HOUR_S, fingerprint=BASE).token
    enrol(call, **enrolling(used))
    expired = link._enrolments.create_invitation("dora", 0.001, fingerprint=BASE).token
    time.sleep(0.01)

    assert enrol(call, **enrolling("x.y")) == (403, {"reason": "unknown"})
    assert enrol(call, **enrolling(used)) == (409, {"reason": "used"})
    assert enrol(call, **enrolling(expired)) == (410, {"reason": "expired"})


@pytest.mark.parametrize(
    "changed", [{"public_key": "none"}, {"identity": "none"}, {"proof": "none"}]
)
def test_key_identity_or_proof_that_is_none_is_refused(call, fresh_limit, changed):
    sent = {**enrolling("x.y"), **changed}

    assert enrol(call, **sent) == (400, {"reason": "bad-key"})


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"null",
        b"{}",
        b"\xff",
        b"[" * 5000,
        b'{"token": "x.y", "public_key": "x"}',
        b'{"token": 1, "public_key": "x", "identity": "x", "proof": "x"}',
        b'{"token": "x.y", "public_key": "x", "identity": null, "proof": "x"}',
        b'{"token": "x.y", "public_key": "x", "identity": "x", "proof": ["x"]}',
    ],
)
def test_malformed_enrolment_is_a_bad_request(call, fresh_limit, body):
    assert call("POST", "/v1/enrol", body)[0] == 400


def test_oversized_enrolment_is_refused(call, fresh_limit):
    assert call("POST", "/v1/enrol", b'{"token": "' + b"x" * 9000 + b'"}')[0] == 413


def test_enrolment_is_rate_limited_for_one_source(link, call, monkeypatch):
    monkeypatch.setattr(link._listener._server.config.app, "_limiter", RateLimiter(2, 60))

    statuses = [enrol(call, **enrolling("x.y"))[0] for _ in range(4)]

    assert statuses == [403, 403, 429, 429]
    assert call("GET", "/health")[0] == 200


def test_rate_limiter_forgets_after_its_period_and_never_grows():
    limiter = RateLimiter(1, 60.0, max_sources=3)

    assert limiter.allow("a", 0.0)
    assert not limiter.allow("a", 59.0)
    assert limiter.allow("a", 60.0)
    for number in range(100):
        limiter.allow(str(number), 61.0)
    assert len(limiter._seen) == 3


def test_all_networks_together_have_a_limit_too():
    limit = EnrolmentLimit(2)

    allowed = [limit.allow(f"10.0.{at // 250}.{at % 250}", 0.0) for at in range(100)]

    assert allowed.count(True) == 60
    assert limit.allow("10.1.1.1", 60.0)


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("", ""),
    ],
)
def test_one_customer_is_one_source(address, network):
    assert network_of(address) == network


def test_ten_thousand_guesses_of_a_token_learn_nothing_and_leave_it_good(link, monkeypatch):
    """The limit put aside, so that the token alone stands against the guesses."""
    enrolments = link._enrolments
    token = enrolments.create_invitation("guessed", HOUR_S, fingerprint=BASE).token
    token_id, _, secret = token.partition(".")
    sent = enrolling(f"{token_id}.x")
    guesses = (
        f"{token_id}.{secret[:-1]}{chr(33 + at % 90)}x" if at % 2 else f"{at:016x}.{secret}"
        for at in range(10_000)
    )
    monkeypatch.setattr(
        "fedpeft_server.enrolments.enrolment.check_possession", lambda *_, **__: None
    )

    reasons = set()
    for guess in guesses:
        with pytest.raises(InvitationRefused) as caught:
            enrolments.redeem(guess, sent["public_key"], sent["identity"], "")
        reasons.add(caught.value.refusal)

    assert reasons == {"unknown"}
    monkeypatch.undo()
    mine = enrolling(token)
    assert enrolments.redeem(token, mine["public_key"], mine["identity"], mine["proof"])


def test_ten_thousand_tries_over_the_network_get_no_further_than_the_limit(link, call, monkeypatch):
    asked = []
    door = link._listener._server.config.app
    monkeypatch.setattr(door, "_limiter", EnrolmentLimit(10))
    monkeypatch.setattr(door, "_enrol", lambda *fields: asked.append(fields) or {})
    body = json.dumps(enrolling("x.y")).encode()
    request = (
        f"POST /v1/enrol HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode() + body

    statuses = [int(call.raw(request).split()[1]) for _ in range(50)]
    limit = door._limiter
    began = time.monotonic()
    assert not any(limit.allow("127.0.0.1", began) for _ in range(10_000))

    assert statuses.count(200) == len(asked) == 10
    assert statuses.count(429) == 40


def test_meter_counts_every_decrypted_byte(link, call):
    request = b"GET /health HTTP/1.1\r\nHost: x\r\nX-Fill: " + b"f" * 5000
    request += b"\r\nConnection: close\r\n\r\n"
    up, down = link.meter.bytes_up, link.meter.bytes_down

    answer = call.raw(request)

    assert link.meter.bytes_up - up == len(request)
    assert link.meter.bytes_down - down == len(answer)


def test_only_tls_13_is_spoken(link, authority):
    tls = ssl.create_default_context(cafile=str(authority.ca_certificate))
    tls.maximum_version = ssl.TLSVersion.TLSv1_2

    with (
        socket.create_connection(("127.0.0.1", link.port), timeout=5) as plain,
        pytest.raises(ssl.SSLError),
    ):
        tls.wrap_socket(plain, server_hostname="localhost")


def test_no_socket_but_the_public_one_is_opened(tmp_path, authority):
    def listening() -> set[str]:
        lines = Path(f"/proc/{os.getpid()}/net/tcp").read_text().splitlines()[1:]
        rows = [line.split() for line in lines]
        files = Path("/proc/self/fd").iterdir()
        mine = {str(file.readlink()) for file in files if file.is_symlink()}
        return {row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in mine}

    before = listening()
    with SuperLink(settings_in(tmp_path), authority, enrolments_in(tmp_path, authority)):
        assert len(listening() - before) == 1


def test_port_in_use_is_one_clear_sentence(link, tmp_path, authority):
    second = SuperLink(
        settings_in(tmp_path, port=link.port), authority, enrolments_in(tmp_path, authority)
    )

    with pytest.raises(PortInUse, match=f"port {link.port} on 127.0.0.1 is already in use"), second:
        pass


def test_foreign_address_cannot_be_listened_on(tmp_path, authority):
    second = SuperLink(
        settings_in(tmp_path, host="192.0.2.1"), authority, enrolments_in(tmp_path, authority)
    )

    with pytest.raises(ConnectionFailed, match=r"cannot listen on 192\.0\.2\.1"), second:
        pass


def test_directory_serves_one_server_at_a_time(tmp_path, authority):
    enrolments = enrolments_in(tmp_path, authority)

    with (
        SuperLink(settings_in(tmp_path), authority, enrolments),
        pytest.raises(StorageError, match="another fedpeft-server is running"),
        SuperLink(settings_in(tmp_path), authority, enrolments),
    ):
        pass
    with SuperLink(settings_in(tmp_path), authority, enrolments):
        pass


def test_restart_keeps_nodes_and_makes_a_new_run(tmp_path, authority):
    enrolments = enrolments_in(tmp_path, authority)
    token = enrolments.create_invitation("anna", HOUR_S, fingerprint=BASE).token
    with SuperLink(settings_in(tmp_path), authority, enrolments) as first:
        first._enrol(**enrolling(token))
        names, run_id = first.names(), first.grid.run.run_id

    with SuperLink(settings_in(tmp_path), authority, enrolments) as second:
        assert second.names() == names
        assert second.grid.run.run_id != run_id


def test_clinic_whose_registration_was_cut_short_gets_its_node_at_the_next_start(
    tmp_path, authority
):
    enrolments = enrolments_in(tmp_path, authority)
    sent = enrolling(enrolments.create_invitation("anna", HOUR_S, fingerprint=BASE).token)
    enrolments.redeem(sent["token"], sent["public_key"], sent["identity"], sent["proof"])

    with SuperLink(settings_in(tmp_path), authority, enrolments) as link:
        assert list(link.names().values()) == ["anna"]


def test_clinic_without_an_identity_is_turned_away_and_not_counted(tmp_path, authority):
    enrolments = enrolments_in(tmp_path, authority)
    token = enrolments.create_invitation("anna", HOUR_S, fingerprint=BASE).token
    sent = enrolling(token)
    with SuperLink(settings_in(tmp_path), authority, enrolments) as link:
        link._enrol(**sent)
    with closing(sqlite3.connect(tmp_path / "enrolment.db")) as database:
        # As the release before sealing left it.
        database.execute("UPDATE clinics SET identity = NULL")
        database.commit()

    with SuperLink(settings_in(tmp_path), authority, enrolments) as link:
        key = base64.b64encode(sent["public_key"].encode()).decode()
        status, content = Caller(link, authority)(
            "POST", "/v1/fleet/pull-messages", Flwr_Public_Key=key, Content_Type=PROTOBUF
        )
        assert (link.names(), link.identities(), link.connected()) == ({}, {}, {})

    assert (status, json.loads(content)) == (401, {"reason": "not-enrolled"})


def test_stopping_takes_seconds_and_leaves_no_thread(tmp_path, authority):
    before = set(threading.enumerate())
    with SuperLink(settings_in(tmp_path), authority, enrolments_in(tmp_path, authority)):
        started = time.monotonic()

    assert time.monotonic() - started < 5
    assert {thread for thread in threading.enumerate() if not thread.daemon} <= before


def run_status(link, run_id):
    return link._state.get_run_info(run_ids=[run_id])[0].status


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_run_calls_the_app_here_and_ends_whatever_happens(tmp_path, authority, error):
    app = ServerApp()
    seen = []

    @app.main()
    def main(grid, context):
        seen.append((threading.current_thread(), context.run_id))
        if error:
            raise error("stop")

    with SuperLink(settings_in(tmp_path), authority, enrolments_in(tmp_path, authority)) as link:
        run_id = link.grid.run.run_id
        if error:
            with pytest.raises(error):
                link.run(app)
        else:
            link.run(app)
        status = run_status(link, run_id)

    assert seen == [(threading.current_thread(), run_id)]
    assert (status.status, status.sub_status) == ("finished", "failed" if error else "completed")


def test_message_to_a_clinic_that_never_connected_is_not_waited_for(link, member):
    node_id = next(iter(link.names()))

    started = time.monotonic()
    replies = link.grid.send_and_receive(
        [Message(RecordDict({"c": ConfigRecord({"x": 1})}), node_id, "train")], timeout=30
    )

    assert list(replies) == []
    assert time.monotonic() - started < 5


def test_a_database_that_is_busy_is_waited_for(tmp_path, authority, monkeypatch):
    # Flower's own patience, here too short for what follows.
    monkeypatch.setattr("flwr.supercore.sql_mixin.SQLITE_PRAGMAS", (("busy_timeout", "1"),))
    with SuperLink(settings_in(tmp_path), authority, enrolments_in(tmp_path, authority)) as running:
        other = sqlite3.connect(tmp_path / "flower.db", check_same_thread=False)
        other.execute("BEGIN EXCLUSIVE")
        released = threading.Timer(0.5, other.rollback)
        released.start()
        began = time.monotonic()
        state, task_id = running._state, running._task_id
        assert state is not None and task_id is not None
        assert state.acknowledge_task_heartbeat(task_id)
        assert time.monotonic() - began > 0.3
        released.join()
        other.close()


def test_lost_run_is_an_error_of_the_federation(tmp_path, authority):
    with SuperLink(settings_in(tmp_path), authority, enrolments_in(tmp_path, authority)) as link:
        link.grid._lost.set()
        with pytest.raises(FederationError, match="was the machine suspended"):
            link.grid.push_messages([])


def test_using_the_server_outside_its_block_is_an_error(tmp_path, authority):
    link = SuperLink(settings_in(tmp_path), authority, enrolments_in(tmp_path, authority))

    with pytest.raises(FederationError, match="inside its `with` block"):
        link.connected()


def test_flower_and_uvicorn_say_nothing_below_warning(tmp_path, authority, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    with SuperLink(settings_in(tmp_path), authority, enrolments_in(tmp_path, authority)) as link:
        Caller(link, authority)("GET", "/health")

    noisy = [
        record for record in caplog.records if not record.name.startswith(("fedpeft", "asyncio"))
    ]
    assert [record.name for record in noisy if record.levelno < logging.WARNING] == []
    assert capfd.readouterr() == ("", "")


def test_idle_connections_do_not_delay_the_stop(tmp_path, authority):
    tls = ssl.create_default_context(cafile=str(authority.ca_certificate))
    with SuperLink(settings_in(tmp_path), authority, enrolments_in(tmp_path, authority)) as link:
        plain = socket.create_connection(("127.0.0.1", link.port), timeout=10)
        idle = tls.wrap_socket(plain, server_hostname="localhost")
        idle.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        idle.recv(100)
        # The keep-alive timeout has begun to close the connection when the stop comes.
        listener: Any = link._listener
        protocol = next(iter(listener._server.server_state.connections))
        protocol.loop.call_soon_threadsafe(protocol.timeout_keep_alive_handler)
        time.sleep(0.2)
        started = time.monotonic()

    assert time.monotonic() - started < 1.5
    idle.close()
