"""A clinic without a network is admitted by the same checks as over the network."""

import dataclasses
import time
from pathlib import Path

import pytest

from fedpeft.errors import ConfigError, EnrolmentError
from fedpeft.sealing import Identity
from fedpeft.sealing.join_file import JoinRequest
from fedpeft_server.enrolments.enrolment import Enrolments
from fedpeft_server.enrolments.refusal import InvitationRefused
from fedpeft_server.sticks.admission import carrier_of
from tests.server.test_enrolment import HOUR_S, new_key

NORTH = Identity.generate()


@pytest.fixture
def enrolments(tmp_path: Path) -> Enrolments:
    return Enrolments(
        tmp_path / "enrolment.db",
        federation="sea",
        server="localhost:1",
        ca_pem="a certificate",
        identity=Identity.generate().public,
    )


def invited(enrolments: Enrolments, identity: Identity = NORTH) -> JoinRequest:
    invitation = enrolments.create_invitation("north", HOUR_S, fingerprint="f" * 64)
    return asking(invitation.token, identity)


def asking(token: str, identity: Identity) -> JoinRequest:
    return JoinRequest.make(
        identity, federation="sea", clinic="north", token=token, public_key=new_key()
    )


def test_a_request_without_the_token_is_refused(enrolments: Enrolments):
    request = invited(enrolments)
    stranger = asking(f"{request.token_id}.a-guess", Identity.generate())
    for wrong in (stranger, asking("nothing.nothing", NORTH)):
        with pytest.raises(InvitationRefused, match="does not know the invitation"):
            enrolments.admit(wrong)
    assert enrolments.clinics() == []


def test_the_proofs_of_one_request_fit_no_other_keys(enrolments: Enrolments):
    request, other = invited(enrolments), asking("0.0", Identity.generate())
    for changes in (
        {"public_key": other.public_key},
        {"identity": other.identity},
        {"identity": other.identity, "possession": other.possession},
    ):
        with pytest.raises(EnrolmentError):
            enrolments.admit(dataclasses.replace(request, **changes))
    assert enrolments.clinics() == []


def test_a_request_in_another_name_than_the_invitation_s_is_refused(enrolments: Enrolments):
    request = invited(enrolments)
    with pytest.raises(EnrolmentError, match=r"name of clinic 'south'.* is that of 'north'"):
        enrolments.admit(dataclasses.replace(request, clinic="south"))
    assert enrolments.clinics() == []
    assert enrolments.admit(request) == "north"


def test_who_lacks_the_token_does_not_learn_whose_it_is(enrolments: Enrolments):
    request = asking(f"{invited(enrolments).token_id}.a-guess", NORTH)
    with pytest.raises(InvitationRefused, match="does not know the invitation"):
        enrolments.admit(dataclasses.replace(request, clinic="south"))


def test_a_request_is_good_until_the_invitation_expires(enrolments: Enrolments):
    request = invited(enrolments)
    with pytest.raises(InvitationRefused, match="has expired"):
        enrolments.admit(request, now=time.time() + HOUR_S + 1)


def test_an_invitation_admits_one_box_and_that_one_again(enrolments: Enrolments):
    invitation = enrolments.create_invitation("north", HOUR_S, fingerprint="f" * 64)
    request = asking(invitation.token, NORTH)
    assert enrolments.admit(request) == enrolments.admit(request) == "north"
    with pytest.raises(InvitationRefused, match="already used"):
        enrolments.admit(asking(invitation.token, Identity.generate()))
    (clinic,) = enrolments.clinics()
    assert clinic.identity == NORTH.public


def test_who_was_admitted_is_reached_by_stick_until_somebody_says_otherwise(enrolments: Enrolments):
    enrolments.admit(invited(enrolments))
    assert [each.carrier for each in enrolments.clinics()] == ["stick"]
    enrolments.carry("north", "network")
    assert [each.carrier for each in enrolments.clinics()] == ["network"]


def test_only_a_clinic_can_be_carried_and_only_in_two_ways(enrolments: Enrolments):
    with pytest.raises(EnrolmentError, match="no clinic named 'south'"):
        enrolments.carry("south", "stick")
    with pytest.raises(ConfigError, match="write network or stick"):
        carrier_of("pigeon")
