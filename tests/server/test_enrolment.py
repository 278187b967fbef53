import json
import sqlite3
import stat
import threading
import time

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from fedpeft.errors import EnrolmentError, StorageError
from fedpeft_server.enrolment import Enrolments, InvitationRefused

HOUR_S = 3600.0
BASE = "f" * 64


def public_pem(key) -> str:
    return (
        key.public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        .decode()
    )


def new_key() -> str:
    return public_pem(ec.generate_private_key(ec.SECP384R1()))


@pytest.fixture
def enrolments(tmp_path) -> Enrolments:
    return Enrolments(
        tmp_path / "enrolment.db", federation="heart", server="fl.example:8443", ca_pem="CA"
    )


def refusal_of(enrolments, token, key=None, now=None) -> str:
    with pytest.raises(InvitationRefused) as caught:
        enrolments.redeem(token, key or new_key(), now)
    return caught.value.refusal


def test_invitation_file_holds_what_a_clinic_needs(enrolments, tmp_path):
    enrolments.create_invitation("St.Anna", HOUR_S, fingerprint=BASE).write(tmp_path / "anna.json")

    document = json.loads((tmp_path / "anna.json").read_text())
    token = document.pop("token")
    expires = document.pop("expires")
    assert document == {
        "schema": 1,
        "server": "fl.example:8443",
        "federation": "heart",
        "clinic": "St.Anna",
        "base_model": BASE,
        "ca": "CA",
    }
    assert len(token) > 40
    assert expires.endswith("+00:00")
    assert stat.S_IMODE((tmp_path / "anna.json").stat().st_mode) == 0o600


def test_invitation_file_is_never_replaced(enrolments, tmp_path):
    (tmp_path / "anna.json").write_text("mine")

    with pytest.raises(StorageError, match="choose another file name"):
        enrolments.create_invitation("anna", HOUR_S, fingerprint=BASE).write(tmp_path / "anna.json")


def test_token_appears_neither_in_the_database_nor_in_a_repr(enrolments, tmp_path):
    invitation = enrolments.create_invitation("anna", HOUR_S, fingerprint=BASE)

    secret = invitation.token.partition(".")[2]
    for path in tmp_path.iterdir():
        assert secret.encode() not in path.read_bytes()
    assert secret not in repr(invitation)


def test_redeeming_enrols_the_clinic(enrolments):
    key = new_key()

    name = enrolments.redeem(
        enrolments.create_invitation("anna", HOUR_S, fingerprint=BASE).token, key
    )

    assert name == "anna"
    (clinic,) = enrolments.clinics()
    assert (clinic.name, clinic.public_key, clinic.node_id) == ("anna", key, None)


def test_token_works_for_one_key_only(enrolments):
    token = enrolments.create_invitation("anna", HOUR_S, fingerprint=BASE).token
    enrolments.redeem(token, new_key())

    assert refusal_of(enrolments, token) == "used"


def test_repeating_with_the_same_key_is_answered_again(enrolments):
    token, key = enrolments.create_invitation("anna", HOUR_S, fingerprint=BASE).token, new_key()
    enrolments.redeem(token, key)

    assert enrolments.redeem(token, key) == "anna"
    assert len(enrolments.clinics()) == 1


def test_token_expires(enrolments):
    token = enrolments.create_invitation("anna", HOUR_S, fingerprint=BASE).token

    assert refusal_of(enrolments, token, now=time.time() + HOUR_S + 1) == "expired"
    assert enrolments.clinics() == []


@pytest.mark.parametrize(
    "change", [lambda t: "x" + t, lambda t: t[:-1], lambda t: "", lambda t: "."]
)
def test_wrong_token_is_unknown_and_leaves_the_right_one_good(enrolments, change):
    token = enrolments.create_invitation("anna", HOUR_S, fingerprint=BASE).token

    assert refusal_of(enrolments, change(token)) == "unknown"
    assert enrolments.redeem(token, new_key()) == "anna"


def test_wrong_secret_learns_nothing_of_a_used_or_expired_token(enrolments):
    used = enrolments.create_invitation("anna", HOUR_S, fingerprint=BASE).token
    enrolments.redeem(used, new_key())

    assert refusal_of(enrolments, used[:-2] + "xx") == "unknown"


def test_refusals_have_three_different_sentences():
    sentences = {str(InvitationRefused(each)) for each in ("unknown", "expired", "used")}
    assert len(sentences) == 3


def test_one_of_many_concurrent_redemptions_wins(enrolments):
    token = enrolments.create_invitation("anna", HOUR_S, fingerprint=BASE).token
    outcomes: list[str] = []
    together = threading.Barrier(8)

    def attempt(key: str) -> None:
        together.wait()
        try:
            outcomes.append(enrolments.redeem(token, key))
        except InvitationRefused as error:
            outcomes.append(error.refusal)

    threads = [threading.Thread(target=attempt, args=(new_key(),)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(outcomes) == ["anna"] + ["used"] * 7
    assert len(enrolments.clinics()) == 1


def test_newer_invitation_replaces_the_older(enrolments):
    older = enrolments.create_invitation("anna", HOUR_S, fingerprint=BASE).token
    newer = enrolments.create_invitation("anna", HOUR_S, fingerprint=BASE).token

    assert refusal_of(enrolments, older) == "unknown"
    assert enrolments.redeem(newer, new_key()) == "anna"


def test_name_of_an_enrolled_clinic_is_refused_until_removed(enrolments):
    enrolments.redeem(
        enrolments.create_invitation("anna", HOUR_S, fingerprint=BASE).token, new_key()
    )

    with pytest.raises(EnrolmentError, match="already enrolled"):
        enrolments.create_invitation("anna", HOUR_S, fingerprint=BASE)
    enrolments.remove("anna")

    assert enrolments.clinics() == []
    assert enrolments.redeem(
        enrolments.create_invitation("anna", HOUR_S, fingerprint=BASE).token, new_key()
    )


def test_removing_a_stranger_is_an_error(enrolments):
    with pytest.raises(EnrolmentError, match="no clinic named 'bert'"):
        enrolments.remove("bert")


def test_key_of_another_clinic_is_refused_and_the_token_stays_good(enrolments):
    key = new_key()
    enrolments.redeem(enrolments.create_invitation("anna", HOUR_S, fingerprint=BASE).token, key)
    token = enrolments.create_invitation("bert", HOUR_S, fingerprint=BASE).token

    with pytest.raises(EnrolmentError, match="already belongs"):
        enrolments.redeem(token, key)
    assert enrolments.redeem(token, new_key()) == "bert"


@pytest.mark.parametrize(
    "key",
    [
        "",
        "no key",
        public_pem(ec.generate_private_key(ec.SECP256R1())),
        public_pem(rsa.generate_private_key(65537, 2048)),
    ],
)
def test_what_is_no_p384_key_is_refused(enrolments, key):
    token = enrolments.create_invitation("anna", HOUR_S, fingerprint=BASE).token

    with pytest.raises(EnrolmentError, match="key"):
        enrolments.redeem(token, key)
    assert enrolments.redeem(token, new_key()) == "anna"


@pytest.mark.parametrize("name", ["", " anna", "a\nb", "a/b", "x" * 65, "'; DROP TABLE clinics"])
def test_unfit_names_are_refused(enrolments, name):
    with pytest.raises(EnrolmentError, match="cannot be a clinic's name"):
        enrolments.create_invitation(name, HOUR_S, fingerprint=BASE)


@pytest.mark.parametrize("period_s", [0.0, -1.0, float("nan")])
def test_period_must_be_positive(enrolments, period_s):
    with pytest.raises(EnrolmentError, match="positive period"):
        enrolments.create_invitation("anna", period_s, fingerprint=BASE)


def test_node_id_of_64_bits_survives(enrolments):
    enrolments.redeem(
        enrolments.create_invitation("anna", HOUR_S, fingerprint=BASE).token, new_key()
    )

    enrolments.set_node_id("anna", 2**64 - 1)

    assert enrolments.clinics()[0].node_id == 2**64 - 1


def test_file_persists_with_mode_600_and_a_schema_version(enrolments, tmp_path):
    token = enrolments.create_invitation("anna", HOUR_S, fingerprint=BASE).token
    path = tmp_path / "enrolment.db"

    again = Enrolments(path, federation="heart", server="s:1", ca_pem="CA")

    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert again.redeem(token, new_key()) == "anna"


def test_newer_schema_is_refused(enrolments, tmp_path):
    database = sqlite3.connect(tmp_path / "enrolment.db")
    database.execute("PRAGMA user_version = 99")
    database.close()

    with pytest.raises(StorageError, match="schema 99"):
        Enrolments(tmp_path / "enrolment.db", federation="f", server="s:1", ca_pem="CA")


def test_foreign_file_is_refused(tmp_path):
    (tmp_path / "enrolment.db").write_bytes(b"this is no database at all" * 10)

    with pytest.raises(StorageError, match="cannot be used"):
        Enrolments(tmp_path / "enrolment.db", federation="f", server="s:1", ca_pem="CA")
