"""A box without a network, by its own commands: what it is told, and how it renews its keys."""

import json
import re
import time
from pathlib import Path

import pytest

from fedpeft.errors import ConfigError, EnrolmentError, StickRefused, StorageError
from fedpeft.protocol.stick_file import question_file
from fedpeft.sealing import SERVER, Context, Identity, clinic_role, seal
from fedpeft.sealing.renewal_file import RenewalRequest
from fedpeft_client.box import open_box
from fedpeft_client.keys.key_life import expiry_of
from fedpeft_server.enrolments.rotation import renew_clinic
from fedpeft_server.site.directory import open_site
from tests.integration.test_usb_rounds import Town, client, ended, server


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())


@pytest.fixture
def town(tmp_path: Path) -> Town:
    """A site that does not run, and anna's box, reached by stick."""
    made = Town(tmp_path, "sealed")
    made.join("anna")
    settings = made.box("anna") / "client.toml"
    settings.write_text(
        settings.read_text().replace("min_free_disk_mb = 1024", "min_free_disk_mb = 0")
    )
    return made


def ask(town: Town, name: str, *options: str) -> Path:
    """Write anna's request to renew her keys."""
    request = town.root / f"{name}.json"
    client("rotate", town.box("anna"), "--stick", request, *options)
    return request


def confirm(town: Town, request: Path) -> Path:
    confirmation = request.with_suffix(".confirmed")
    server("renew", request, "--dir", town.site, "--out", confirmation)
    return confirmation


def keys(town: Town) -> tuple[str, str]:
    """Return anna's connection key and identity, as the site knows them."""
    (anna,) = open_site(town.site).enrolments().clinics()
    assert anna.identity is not None
    return anna.public_key, anna.identity.fingerprint


# What is said


def test_a_box_that_awaits_its_ticket_is_told_to_bring_the_request(tmp_path: Path) -> None:
    town = Town(tmp_path, "sealed")
    box = town.box("anna")
    server("invite", "anna", "--dir", town.site, "--out", tmp_path / "invitation")
    client(
        *("join", tmp_path / "invitation", "--dir", box, "--model", "embedded"),
        *(*town.write_records("anna"), "--stick", tmp_path / "request"),
    )
    question = tmp_path / "question"
    for command in (("round", "run", question, "--dir", box), ("check", box), ("start", box)):
        with pytest.raises(EnrolmentError, match="was not admitted yet: bring its request"):
            client(*command)


def test_a_second_ticket_is_not_awaited(town: Town, tmp_path: Path) -> None:
    with pytest.raises(EnrolmentError, match="has joined already and awaits no ticket"):
        client("ticket", tmp_path / "anna.ticket", town.box("anna"))
    with pytest.raises(EnrolmentError, match="has not asked to join by stick"):
        client("ticket", tmp_path / "anna.ticket", tmp_path)


def test_nothing_is_started_where_rounds_come_by_file(town: Town) -> None:
    with pytest.raises(ConfigError, match="nothing to start on a box without a network"):
        client("start", town.box("anna"))
    with pytest.raises(ConfigError, match=r"rotate \S+ --identity --stick REQUEST"):
        client("rotate", town.box("anna"), "--identity")


def test_a_box_without_a_network_is_checked_without_one(
    town: Town, capsys: pytest.CaptureFixture[str]
) -> None:
    client("check", town.box("anna"))
    told = said(capsys)
    assert "stick ok: no network is needed, rounds come as files; none has come yet" in told
    assert "round run FILE --dir" in told
    assert not re.search(r"server\s+(ok|PROBLEM)|PROBLEM|client start", told)
    ask(town, "request")
    client("check", town.box("anna"))
    assert "new keys await the confirmation of the central site" in said(capsys)
    (town.box("anna") / "sticks").mkdir()
    (town.box("anna") / "sticks" / "diary").write_bytes(b"damaged")
    client("check", town.box("anna"))
    told = said(capsys)
    assert "stick PROBLEM" in told
    assert "can take part" not in told


def test_a_server_with_another_identity_is_foreign_and_what_may_help_is_said(
    town: Town, tmp_path: Path
) -> None:
    other, box = Identity.generate(), open_box(town.box("anna"))
    place = Context(
        federation="heart",
        run=7,
        round=0,
        attempt=1,
        sender=SERVER,
        receiver=clinic_role("anna"),
        purpose="evaluate",
        schema="ab" * 32,
    )
    own = box.load_identity(lambda: "").public
    question = question_file(seal(b"", place, sender=other, receiver=own), None)
    path = tmp_path / question.name
    path.write_bytes(question.to_bytes(other))
    with pytest.raises(StickRefused, match="if the central site has renewed its identity, renew"):
        client("round", "run", path, "--dir", box.directory)


def test_requests_are_written_where_there_is_a_folder(town: Town, tmp_path: Path) -> None:
    missing = tmp_path / "missing" / "request"
    with pytest.raises(StorageError, match="no folder"):
        client("rotate", town.box("anna"), "--stick", missing)
    assert not (town.box("anna") / "key.next.pem").exists()
    server("invite", "bert", "--dir", town.site, "--out", tmp_path / "bert.json")
    options = ["--dir", town.box("bert"), "--model", "embedded", *town.write_records("bert")]
    with pytest.raises(StorageError, match="no folder"):
        client("join", tmp_path / "bert.json", *options, "--stick", missing)
    assert not town.box("bert").exists()


# Keys renewed by file


def test_a_renewal_that_is_not_asked_for_or_of_others_is_refused(town: Town) -> None:
    ticket = town.root / "anna.ticket"
    request = ask(town, "request")
    assert request.read_bytes() == ask(town, "again").read_bytes()
    with pytest.raises(StickRefused, match="not the file that is asked for"):
        client("ticket", ticket, town.box("anna"))
    key = confirm(town, request)
    both = ask(town, "both", "--identity")
    with pytest.raises(StickRefused, match="confirms another request than the last one"):
        client("ticket", key, town.box("anna"))
    text = both.read_text()
    both.write_text(text.replace('"clinic": "anna"', '"clinic": "bert"'))
    with pytest.raises(StickRefused, match="not the file that is asked for"):
        confirm(town, both)
    both.write_text(text)
    server("revoke", "anna", "--dir", town.site)
    with pytest.raises(EnrolmentError, match="no clinic named 'anna' is enrolled"):
        confirm(town, both)


def test_keys_and_the_servers_identity_are_renewed_by_file(
    town: Town, capsys: pytest.CaptureFixture[str]
) -> None:
    box, before = open_box(town.box("anna")), keys(town)
    pinned, first = box.server_identity, expiry_of(box.directory)
    server("rotate", "--identity", "--dir", town.site)
    time.sleep(1.1)  # moments in membership.json are whole seconds
    request = ask(town, "request", "--identity")
    # As after a kill between the two statements.
    asked = RenewalRequest.from_json(request.read_bytes())
    renew_clinic(open_site(town.site).enrolments(), asked.key)
    confirmation = confirm(town, request)
    assert confirm(town, request).read_bytes() == confirmation.read_bytes()
    after = keys(town)
    assert after[0] != before[0]
    assert after[1] != before[1]
    # Nothing has changed on the box; then all of it, and a second time nothing.
    assert box.load_identity(lambda: "").public.fingerprint == before[1]
    client("ticket", confirmation, box.directory)
    assert box.load_identity(lambda: "").public.fingerprint == after[1]
    assert box.server_identity == open_site(town.site).sealing.public != pinned
    renewed = expiry_of(box.directory)
    assert first is not None and renewed is not None
    assert renewed.key > first.key
    assert "the server's identity was renewed too" in said(capsys)
    assert not [path.name for path in box.directory.iterdir() if "next" in path.name]
    with pytest.raises(EnrolmentError, match="awaits no ticket"):
        client("ticket", confirmation, box.directory)
    for program, place in ((client, box.directory), (server, town.site)):
        program("audit-log", "verify", place)
    # The next renewal begins with the new keys.
    client("ticket", confirm(town, ask(town, "next")), box.directory)
    assert keys(town)[0] != after[0]
    assert keys(town)[1] == after[1]


@pytest.mark.parametrize("gone", ["key.next.pem", "identity.next.key"])
def test_a_box_that_was_killed_while_it_took_a_confirmation_goes_on(town: Town, gone: str) -> None:
    box = town.box("anna")
    confirmation = confirm(town, ask(town, "request", "--identity"))
    names = {"key.next.pem": "key.pem", "identity.next.key": "identity.key"}
    (box / "key.next.pem").replace(box / "key.pem")
    if gone == "identity.next.key":
        (box / gone).replace(box / names[gone])
    client("ticket", confirmation, box)
    assert keys(town)[1] == open_box(box).load_identity(lambda: "").public.fingerprint
    assert not [path.name for path in box.iterdir() if "next" in path.name or "renew" in path.name]


def test_an_identity_is_renewed_between_two_questions_and_the_run_goes_on(tmp_path: Path) -> None:
    town = Town(tmp_path, "sealed")
    for name in ("anna", "bert", "clara"):
        town.join(name)
    with town.serving() as process:
        town.wait_for("evaluate", 3, 0)
        answers = [town.answer(each) for each in town.export()]
        request = ask(town, "request", "--identity")
        with pytest.raises(StickRefused, match="too early: anna is asked in round 0"):
            confirm(town, request)
        town.bring(answers[0])
        confirmation = _when_taken(town, request)
        town.bring(*answers[1:])
        town.wait_for("train", 3, 1)
        questions = town.export()
        with pytest.raises(StickRefused, match="is for the new identity of this box"):
            town.answer(questions[0])
        client("ticket", confirmation, town.box("anna"))
        town.bring(*(town.answer(each) for each in questions))
        town.trip("evaluate", 3, 1)
        ended(process, town)
    assert [each["participants"] for each in town.rounds()] == [[], ["anna", "bert", "clara"]]
    assert open_site(town.site).enrolments().successions().keys() == {"anna"}
    client("audit-log", "verify", town.box("anna"))


def _when_taken(town: Town, request: Path) -> Path:
    """Renew as soon as the server has taken the answer that was imported."""
    deadline = time.monotonic() + 30
    while True:
        try:
            return confirm(town, request)
        except StickRefused:
            assert time.monotonic() < deadline, town.log()
            time.sleep(0.2)


# Where the answer goes


def test_a_stick_that_cannot_be_written_is_noticed_before_anything_is_computed(
    tmp_path: Path,
) -> None:
    town = Town(tmp_path, "sealed")
    for name in ("anna", "bert", "clara"):
        town.join(name)
    with town.serving():
        town.trip("evaluate", 3, 0)
        town.wait_for("train", 3, 1)
        (question, *_) = town.export("anna")
    other = tmp_path / "other.txt"
    other.write_text("mine")
    for out, why in (
        (tmp_path / "missing" / "answer", "folder"),
        (Path("/proc/answer.fedpeft"), "cannot write /proc/answer.fedpeft"),
        (other, "exists and is something else"),
    ):
        with pytest.raises(StorageError, match=why):
            client("round", "run", question, "--dir", town.box("anna"), "--out", out)
    box = town.box("anna")
    entries = "".join(path.read_text() for path in sorted((box / "audit").glob("*.jsonl")))
    rounds = [line for line in entries.splitlines() if '"type":"train"' in line.replace(" ", "")]
    assert rounds == []
    assert not (tmp_path / "fedpeft-ledger.sqlite").exists()
    assert other.read_text() == "mine"
    assert json.loads((box / "status.json").read_text())["round"] == 0
