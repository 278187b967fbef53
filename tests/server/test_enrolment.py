import hashlib
import json
import sqlite3
import stat
import threading
import time
from contextlib import closing
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from fedpeft.errors import EnrolmentError, StorageError
from fedpeft.sealing.context import clinic_role
from fedpeft.sealing.identity import Identity
from fedpeft.sealing.possession import prove_possession
from fedpeft.sealing.succession import MOST_LINKS, Link, Succession
from fedpeft_server.enrolments.clinic import IDENTITY_DAYS, KEY_DAYS
from fedpeft_server.enrolments.enrolment import Enrolments
from fedpeft_server.enrolments.file import SCHEMA_VERSION
from fedpeft_server.enrolments.refusal import InvitationRefused
from fedpeft_server.enrolments.roster import expiring, roster
from fedpeft_server.enrolments.rotation import renew_clinic

HOUR_S = 3600.0
BASE = "f" * 64
SERVER = Identity.generate().public


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
        tmp_path / "enrolment.db",
        federation="heart",
        server="fl.example:8443",
        ca_pem="CA",
        identity=SERVER,
    )


def redeem(enrolments, token, key, identity=None, now=None) -> str:
    """Enrol as an honest clinic does."""
    identity = identity or Identity.generate()
    proof = prove_possession(identity, federation="heart", token=token, public_key_pem=key)
    return enrolments.redeem(token, key, identity.public.to_text(), proof, now)


def refusal_of(enrolments, token, key=None, identity=None, now=None) -> str:
    with pytest.raises(InvitationRefused) as caught:
        redeem(enrolments, token, key or new_key(), identity, now)
    return caught.value.refusal


def test_invitation_file_holds_what_a_clinic_needs(enrolments, tmp_path):
    enrolments.create_invitation("St.Anna", HOUR_S, fingerprint=BASE).write(tmp_path / "anna.json")

    document = json.loads((tmp_path / "anna.json").read_text())
    token = document.pop("token")
    expires = document.pop("expires")
    assert document == {
        "schema": 2,
        "server": "fl.example:8443",
        "federation": "heart",
        "clinic": "St.Anna",
        "base_model": BASE,
        "identity": SERVER.to_text(),
        "ca": "CA",
    }
    assert len(token) > 40
    assert expires.endswith("+00:00")
    assert stat.S_IMODE((tmp_path / "anna.json").stat().st_mode) == 0o600


def test_invitation_file_is_never_replaced(enrolments, tmp_path):
    (tmp_path / "anna.json").write_text("mine")

    with pytest.raises(StorageError, match="file exists; what stands there is kept"):
        enrolments.create_invitation("anna", HOUR_S, fingerprint=BASE).write(tmp_path / "anna.json")


def test_token_appears_neither_in_the_database_nor_in_a_repr(enrolments, tmp_path):
    invitation = enrolments.create_invitation("anna", HOUR_S, fingerprint=BASE)

    secret = invitation.token.partition(".")[2]
    for path in tmp_path.iterdir():
        assert secret.encode() not in path.read_bytes()
    assert secret not in repr(invitation)


def test_redeeming_enrols_the_clinic(enrolments):
    key = new_key()

    name = redeem(
        enrolments, enrolments.create_invitation("anna", HOUR_S, fingerprint=BASE).token, key
    )

    assert name == "anna"
    (clinic,) = enrolments.clinics()
    assert (clinic.name, clinic.public_key, clinic.node_id) == ("anna", key, None)


def test_token_works_for_one_key_only(enrolments):
    token = enrolments.create_invitation("anna", HOUR_S, fingerprint=BASE).token
    redeem(enrolments, token, new_key())

    assert refusal_of(enrolments, token) == "used"


def test_repeating_with_the_same_keys_is_answered_again(enrolments):
    token, key = enrolments.create_invitation("anna", HOUR_S, fingerprint=BASE).token, new_key()
    identity = Identity.generate()
    redeem(enrolments, token, key, identity)

    assert redeem(enrolments, token, key, identity) == "anna"
    assert len(enrolments.clinics()) == 1


def test_repeating_with_another_identity_is_refused_and_changes_nothing(enrolments):
    token, key = enrolments.create_invitation("anna", HOUR_S, fingerprint=BASE).token, new_key()
    identity = Identity.generate()
    redeem(enrolments, token, key, identity)

    assert refusal_of(enrolments, token, key) == "used"
    assert refusal_of(enrolments, token, new_key(), identity) == "used"
    assert [clinic.identity for clinic in enrolments.clinics()] == [identity.public]


def honest(enrolments, **changed) -> dict[str, Any]:
    """Return what an honest clinic sends, but for ``changed``, which the proof does not cover."""
    token = enrolments.create_invitation("anna", HOUR_S, fingerprint=BASE).token
    identity, key = Identity.generate(), new_key()
    proof = prove_possession(identity, federation="heart", token=token, public_key_pem=key)
    sent = {"token": token, "public_key_pem": key, "proof": proof}
    return {**sent, "identity_text": identity.public.to_text(), **changed}


@pytest.mark.parametrize(
    "changed",
    [
        {"proof": ""},
        {"proof": "no hex"},
        {"proof": "ü"},
        {"proof": "00" * 64},
        {"proof": "00" * 63},
        {"public_key_pem": new_key()},
        {"identity_text": Identity.generate().public.to_text()},
    ],
)
def test_wrong_proof_is_refused_and_the_token_stays_good(enrolments, changed):
    sent = honest(enrolments, **changed)

    with pytest.raises(EnrolmentError, match="did not prove"):
        enrolments.redeem(**sent)
    assert redeem(enrolments, sent["token"], new_key()) == "anna"


def test_proof_of_another_federation_is_refused(enrolments, tmp_path):
    sent = honest(enrolments)
    other = Enrolments(
        tmp_path / "enrolment.db", federation="lung", server="s:1", ca_pem="CA", identity=SERVER
    )

    with pytest.raises(EnrolmentError, match="did not prove"):
        other.redeem(**sent)


def test_identity_and_proof_that_were_overheard_do_not_fit_another_token(enrolments):
    sent = honest(enrolments)
    enrolments.redeem(**sent)
    other = enrolments.create_invitation("bert", HOUR_S, fingerprint=BASE).token

    with pytest.raises(EnrolmentError, match="did not prove"):
        enrolments.redeem(**{**sent, "token": other, "public_key_pem": new_key()})
    assert redeem(enrolments, other, new_key()) == "bert"


@pytest.mark.parametrize("text", ["", "ü", "AAAA", "A" * 1668, SERVER.to_text()[:-4]])
def test_what_is_no_identity_is_refused(enrolments, text):
    with pytest.raises(EnrolmentError, match="not a public identity"):
        enrolments.redeem(**honest(enrolments, identity_text=text))


def test_identity_of_another_clinic_is_refused_and_the_token_stays_good(enrolments):
    identity = Identity.generate()
    first = enrolments.create_invitation("anna", HOUR_S, fingerprint=BASE).token
    redeem(enrolments, first, new_key(), identity)
    token = enrolments.create_invitation("bert", HOUR_S, fingerprint=BASE).token

    with pytest.raises(EnrolmentError, match="already belong"):
        redeem(enrolments, token, new_key(), identity)
    assert redeem(enrolments, token, new_key()) == "bert"


def test_signing_key_of_another_clinic_is_refused_in_a_new_identity_too(enrolments):
    identity = Identity.generate()
    half_new = Identity(identity.seeds[:32] + Identity.generate().seeds[32:])
    first = enrolments.create_invitation("anna", HOUR_S, fingerprint=BASE).token
    redeem(enrolments, first, new_key(), identity)
    token = enrolments.create_invitation("bert", HOUR_S, fingerprint=BASE).token

    with pytest.raises(EnrolmentError, match="already belong"):
        redeem(enrolments, token, new_key(), half_new)


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
    assert redeem(enrolments, token, new_key()) == "anna"


def test_wrong_secret_learns_nothing_of_a_used_or_expired_token(enrolments):
    used = enrolments.create_invitation("anna", HOUR_S, fingerprint=BASE).token
    redeem(enrolments, used, new_key())

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
            outcomes.append(redeem(enrolments, token, key))
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
    assert redeem(enrolments, newer, new_key()) == "anna"


def test_name_of_an_enrolled_clinic_is_refused_until_removed(enrolments):
    redeem(
        enrolments, enrolments.create_invitation("anna", HOUR_S, fingerprint=BASE).token, new_key()
    )

    with pytest.raises(EnrolmentError, match="already enrolled"):
        enrolments.create_invitation("anna", HOUR_S, fingerprint=BASE)
    enrolments.remove("anna")

    assert enrolments.clinics() == []
    assert redeem(
        enrolments, enrolments.create_invitation("anna", HOUR_S, fingerprint=BASE).token, new_key()
    )


def test_removing_a_stranger_is_an_error(enrolments):
    with pytest.raises(EnrolmentError, match="no clinic named 'bert'"):
        enrolments.remove("bert")


def test_key_of_another_clinic_is_refused_and_the_token_stays_good(enrolments):
    key = new_key()
    redeem(enrolments, enrolments.create_invitation("anna", HOUR_S, fingerprint=BASE).token, key)
    token = enrolments.create_invitation("bert", HOUR_S, fingerprint=BASE).token

    with pytest.raises(EnrolmentError, match="already belong"):
        redeem(enrolments, token, key)
    assert redeem(enrolments, token, new_key()) == "bert"


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
        redeem(enrolments, token, key)
    assert redeem(enrolments, token, new_key()) == "anna"


@pytest.mark.parametrize("name", ["", " anna", "a\nb", "a/b", "x" * 65, "'; DROP TABLE clinics"])
def test_unfit_names_are_refused(enrolments, name):
    with pytest.raises(EnrolmentError, match="cannot be a clinic's name"):
        enrolments.create_invitation(name, HOUR_S, fingerprint=BASE)


@pytest.mark.parametrize("period_s", [0.0, -1.0, float("nan")])
def test_period_must_be_positive(enrolments, period_s):
    with pytest.raises(EnrolmentError, match="positive period"):
        enrolments.create_invitation("anna", period_s, fingerprint=BASE)


def test_node_id_of_64_bits_survives(enrolments):
    redeem(
        enrolments, enrolments.create_invitation("anna", HOUR_S, fingerprint=BASE).token, new_key()
    )

    enrolments.set_node_id("anna", 2**64 - 1)

    assert enrolments.clinics()[0].node_id == 2**64 - 1


def test_file_persists_with_mode_600_and_a_schema_version(enrolments, tmp_path):
    token = enrolments.create_invitation("anna", HOUR_S, fingerprint=BASE).token
    path = tmp_path / "enrolment.db"

    again = Enrolments(path, federation="heart", server="s:1", ca_pem="CA", identity=SERVER)

    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert redeem(again, token, new_key()) == "anna"


def test_newer_schema_is_refused(enrolments, tmp_path):
    database = sqlite3.connect(tmp_path / "enrolment.db")
    database.execute("PRAGMA user_version = 99")
    database.close()

    with pytest.raises(StorageError, match="schema 99"):
        Enrolments(
            tmp_path / "enrolment.db", federation="f", server="s:1", ca_pem="CA", identity=SERVER
        )


def test_foreign_file_is_refused(tmp_path):
    (tmp_path / "enrolment.db").write_bytes(b"this is no database at all" * 10)

    with pytest.raises(StorageError, match="cannot be used"):
        Enrolments(
            tmp_path / "enrolment.db", federation="f", server="s:1", ca_pem="CA", identity=SERVER
        )


SCHEMA_1 = """
CREATE TABLE invitations (
    id TEXT PRIMARY KEY,
    token_sha256 BLOB NOT NULL,
    name TEXT NOT NULL UNIQUE,
    expires_at REAL NOT NULL,
    used_at REAL,
    used_key TEXT
) STRICT;
CREATE TABLE clinics (
    name TEXT PRIMARY KEY,
    public_key TEXT NOT NULL UNIQUE,
    node_id TEXT,
    enrolled_at REAL NOT NULL
) STRICT;
PRAGMA user_version = 1;
"""


@pytest.fixture
def old_file(tmp_path):
    """A file of the release before sealing: two clinics and an invitation that is not used."""
    path = tmp_path / "old.db"
    with closing(sqlite3.connect(path)) as database:
        database.executescript(SCHEMA_1)
        for name in ("anna", "bert"):
            row = (f"id-{name}", bytes(32), name, 1e12, 1.0, f"key of {name}")
            database.execute("INSERT INTO invitations VALUES (?, ?, ?, ?, ?, ?)", row)
            row = (name, f"key of {name}", str(2**64 - 1), 1.0)
            database.execute("INSERT INTO clinics VALUES (?, ?, ?, ?)", row)
        token = (hashlib.sha256(b"secret").digest(), "carl", 1e12)
        database.execute("INSERT INTO invitations VALUES ('id-carl', ?, ?, ?, NULL, NULL)", token)
        database.commit()
    return path


def opened(path) -> Enrolments:
    return Enrolments(path, federation="heart", server="s:1", ca_pem="CA", identity=SERVER)


def test_file_of_schema_1_keeps_its_clinics_which_must_enrol_again(old_file):
    enrolments = opened(old_file)

    assert [(each.name, each.identity) for each in enrolments.clinics()] == [
        ("anna", None),
        ("bert", None),
    ]
    assert enrolments.clinics()[0].node_id == 2**64 - 1
    assert enrolments.members() == []
    enrolments.remove("anna")
    token = enrolments.create_invitation("anna", HOUR_S, fingerprint=BASE).token
    redeem(enrolments, token, new_key())
    assert [each.name for each in enrolments.members()] == ["anna"]


def test_file_of_schema_1_keeps_its_open_invitations(old_file):
    assert redeem(opened(old_file), "id-carl.secret", new_key()) == "carl"


def test_file_is_brought_up_once_and_like_a_new_one(old_file, tmp_path):
    def structure(path):
        with closing(sqlite3.connect(path)) as database:
            version = database.execute("PRAGMA user_version").fetchone()[0]
            return version, sorted(database.execute("SELECT type, name, sql FROM sqlite_master"))

    for _ in range(2):
        opened(old_file)
    opened(tmp_path / "new.db")

    assert structure(old_file) == structure(tmp_path / "new.db")
    assert structure(old_file)[0] == SCHEMA_VERSION


def test_migration_that_fails_leaves_the_file_as_it_was(old_file):
    with closing(sqlite3.connect(old_file)) as database:
        database.execute("CREATE TABLE clinics_signing_key (x)")  # takes the index's name
        database.commit()

    with pytest.raises(StorageError, match="cannot be used"):
        opened(old_file)

    with closing(sqlite3.connect(old_file)) as database:
        assert database.execute("PRAGMA user_version").fetchone()[0] == 1
        assert len(database.execute("SELECT * FROM clinics").fetchone()) == 4


# Revoking, renewing, expiring


def enrolled(enrolments, name="anna", key=None, identity=None) -> tuple[str, Identity]:
    key, identity = key or new_key(), identity or Identity.generate()
    token = enrolments.create_invitation(name, HOUR_S, fingerprint=BASE).token
    redeem(enrolments, token, key, identity)
    return key, identity


def test_revoking_a_stranger_is_an_error(enrolments):
    with pytest.raises(EnrolmentError, match="no clinic and no invitation is named 'anna'"):
        enrolments.revoke("anna")


def test_revoked_invitation_is_unknown(enrolments):
    token = enrolments.create_invitation("anna", HOUR_S, fingerprint=BASE).token

    enrolments.revoke("anna")

    assert refusal_of(enrolments, token) == "unknown"


def test_keys_of_a_revoked_clinic_never_come_back_under_any_name(enrolments):
    key, identity = enrolled(enrolments)
    enrolments.revoke("anna")

    assert enrolments.clinics() == []
    for name in ("anna", "bert"):
        token = enrolments.create_invitation(name, HOUR_S, fingerprint=BASE).token
        for shown in ((key, Identity.generate()), (new_key(), identity)):
            with pytest.raises(EnrolmentError, match="were revoked or renewed"):
                redeem(enrolments, token, *shown)
        assert redeem(enrolments, token, new_key()) == name


def test_a_revoked_clinic_may_be_revoked_again_with_its_new_keys(enrolments):
    for _ in range(2):
        enrolled(enrolments)
        enrolments.revoke("anna")

    assert [name for name, _ in enrolments.revoked()] == ["anna", "anna"]


def test_renewed_keys_take_the_place_of_the_old_which_never_come_back(enrolments):
    key, identity = enrolled(enrolments)
    fresh, later = new_key(), time.time() + 1000

    enrolments.renew("anna", (fresh, identity.public.to_text()), later)
    enrolments.renew("anna", (fresh, identity.public.to_text()), later + 1)

    (clinic,) = enrolments.members()
    assert (clinic.public_key, clinic.identity) == (fresh, identity.public)
    assert clinic.keys_expire.timestamp() == pytest.approx(later + KEY_DAYS * 86400)
    with pytest.raises(EnrolmentError, match="were revoked or renewed"):
        enrolments.renew("anna", (key, identity.public.to_text()))
    assert enrolments.revoked() == []


def test_renewing_to_the_key_of_another_clinic_changes_nothing(enrolments):
    key, identity = enrolled(enrolments)
    theirs, _ = enrolled(enrolments, "bert")

    with pytest.raises(EnrolmentError, match="already belong"):
        enrolments.renew("anna", (theirs, identity.public.to_text()))

    assert [each.public_key for each in enrolments.members()] == [key, theirs]
    assert enrolments.members()[0].identity == identity.public


def test_a_key_is_not_renewed_under_another_identity(enrolments):
    key, _ = enrolled(enrolments)
    with pytest.raises(EnrolmentError, match="with this identity"):
        enrolments.renew("anna", (new_key(), Identity.generate().public.to_text()))
    assert enrolments.members()[0].public_key == key


# Renewing identities


def statement(old, new, key, name="anna", federation="heart") -> Succession:
    return Succession.sign(old, new, federation=federation, holder=clinic_role(name), key=key)


def asked(*args, **others) -> str:
    return statement(*args, **others).to_json()


def test_a_renewed_identity_takes_the_place_of_the_old_which_never_comes_back(enrolments):
    key, old = enrolled(enrolments)
    new, third = Identity.generate(), Identity.generate()
    assert enrolments.successions() == {}

    renewed = renew_clinic(enrolments, asked(old, new, key))
    assert renew_clinic(enrolments, asked(old, new, key)) == renewed

    (clinic,) = enrolments.members()
    assert (clinic.public_key, clinic.identity, renewed.old_key) == (key, new.public, "")
    link = statement(old, new, key).link.to_bytes()
    assert enrolments.successions() == {"anna": (link,)}
    with pytest.raises(EnrolmentError, match="join anew"):
        renew_clinic(enrolments, asked(old, third, key))
    with pytest.raises(EnrolmentError, match="were revoked or renewed"):
        renew_clinic(enrolments, asked(new, old, key))
    token = enrolments.create_invitation("bert", HOUR_S, fingerprint=BASE).token
    with pytest.raises(EnrolmentError, match="were revoked or renewed"):
        redeem(enrolments, token, new_key(), old)
    assert enrolments.successions() == {"anna": (link,)}


def test_an_identity_and_a_key_are_renewed_in_turns(enrolments):
    key, identity = enrolled(enrolments)
    for _ in range(3):
        fresh, later = new_key(), Identity.generate()
        renew_clinic(enrolments, asked(identity, identity, fresh))
        renew_clinic(enrolments, asked(identity, later, fresh))
        key, identity = fresh, later
    (clinic,) = enrolments.members()
    assert (clinic.public_key, clinic.identity) == (key, identity.public)
    assert len(enrolments.successions()["anna"]) == 3


def test_what_is_no_renewal_of_the_clinic_changes_nothing(enrolments):
    key, old = enrolled(enrolments)
    their_key, theirs = enrolled(enrolments, "bert")
    new, thief = Identity.generate(), Identity.generate()
    forged = asked(thief, new, key).replace(thief.public.to_text(), old.public.to_text())
    for request in (
        "{}",
        forged,
        asked(old, new, key, name="bert"),
        asked(old, new, key, name="nobody"),
        asked(old, new, key, federation="lake"),
        asked(old, new, their_key),
        asked(old, new, new_key()),
        asked(old, theirs, key),
        asked(thief, new, key),
        asked(old, new, "no key"),
    ):
        with pytest.raises(EnrolmentError):
            renew_clinic(enrolments, request)
    found = [(each.public_key, each.identity) for each in enrolments.members()]
    assert found == [(key, old.public), (their_key, theirs.public)]
    assert enrolments.successions() == {}


def test_an_older_statement_that_is_sent_again_changes_nothing(enrolments):
    _, first = enrolled(enrolments)
    second, third, fresh = Identity.generate(), Identity.generate(), new_key()
    before = [asked(first, first, fresh), asked(first, second, fresh)]
    for request in [*before, asked(second, third, fresh)]:
        renew_clinic(enrolments, request)
    for request in before:
        with pytest.raises(EnrolmentError):
            renew_clinic(enrolments, request)
    (clinic,) = enrolments.members()
    assert (clinic.public_key, clinic.identity) == (fresh, third.public)


def test_a_clinic_that_was_revoked_or_removed_renews_nothing(enrolments):
    for leave in (enrolments.revoke, enrolments.remove):
        key, old = enrolled(enrolments)
        leave("anna")
        with pytest.raises(EnrolmentError, match="join anew"):
            renew_clinic(enrolments, asked(old, Identity.generate(), key))


def test_whoever_joins_under_a_name_that_was_free_inherits_no_chain(enrolments):
    key, old = enrolled(enrolments)
    renew_clinic(enrolments, asked(old, Identity.generate(), key))
    enrolments.revoke("anna")
    enrolled(enrolments)
    assert enrolments.successions() == {}


def test_no_more_links_are_handed_out_than_anybody_reads(enrolments):
    key, identity = enrolled(enrolments)
    for _ in range(MOST_LINKS + 1):
        old, identity = identity, Identity.generate()
        renew_clinic(enrolments, asked(old, identity, key))
    links = enrolments.successions()["anna"]
    assert len(links) == MOST_LINKS
    assert Link.from_bytes(links[-1]).new == identity.public.signing_bytes


def test_a_new_connection_key_does_not_make_an_identity_younger(enrolments):
    key, identity = enrolled(enrolments)
    old_age = (IDENTITY_DAYS - 29) * 86400
    enrolments.succeed(
        "anna", key, statement(identity, later := Identity.generate(), key), time.time() - old_age
    )
    enrolments.renew("anna", (fresh := new_key(), later.public.to_text()))

    (clinic,) = expiring(enrolments)
    assert clinic.expires == clinic.identity_expires < clinic.keys_expire

    enrolments.succeed("anna", fresh, statement(later, Identity.generate(), fresh))
    assert expiring(enrolments) == []


def test_an_identity_that_is_too_old_is_no_membership(enrolments):
    key, identity = enrolled(enrolments)
    long_ago = time.time() - IDENTITY_DAYS * 86400 - 60
    new = Identity.generate()
    enrolments.succeed("anna", key, statement(identity, new, key), long_ago)
    assert enrolments.members() == []
    assert [entry.state for entry in roster(enrolments)] == ["keys expired"]
    with pytest.raises(EnrolmentError, match="join anew"):
        renew_clinic(enrolments, asked(new, Identity.generate(), key))


def test_keys_that_expired_are_no_membership(enrolments):
    _, identity = enrolled(enrolments)
    long_ago = time.time() - KEY_DAYS * 86400

    enrolments.renew("anna", (new_key(), identity.public.to_text()), long_ago + 60)
    assert len(enrolments.members()) == len(expiring(enrolments)) == 1
    enrolments.renew("anna", (new_key(), identity.public.to_text()), long_ago - 60)

    assert enrolments.members() == []
    assert [entry.state for entry in roster(enrolments)] == ["keys expired"]


def test_keys_are_warned_of_a_month_ahead(enrolments):
    _, identity = enrolled(enrolments)
    assert expiring(enrolments) == []

    month_left = time.time() - (KEY_DAYS - 29) * 86400
    enrolments.renew("anna", (new_key(), identity.public.to_text()), month_left)

    assert [each.name for each in expiring(enrolments)] == ["anna"]


def test_the_roster_lists_clinics_invitations_and_what_was_revoked(enrolments):
    key, identity = enrolled(enrolments)
    enrolled(enrolments, "carl")
    enrolments.revoke("carl")
    enrolments.create_invitation("bert", HOUR_S, fingerprint=BASE)
    enrolments.saw(key, 0.0)

    entries = roster(enrolments)

    assert [(entry.name, entry.state) for entry in entries] == [
        ("anna", "enrolled"),
        ("bert", "invited"),
        ("carl", "revoked"),
    ]
    columns = entries[0].line().split("\t")
    assert columns[3] == "1970-01-01 00:00 UTC"
    assert columns[5] == identity.public.fingerprint
    assert entries[1].line().split("\t")[4] != "-"


def test_the_stamp_changes_with_the_clinics(enrolments):
    stamps = {enrolments.stamp()}
    enrolled(enrolments)
    stamps.add(enrolments.stamp())
    enrolments.revoke("anna")
    stamps.add(enrolments.stamp())

    assert len(stamps) == 3
    assert enrolments.stamp() in stamps
