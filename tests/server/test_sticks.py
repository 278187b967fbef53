"""The post of clinics on the stick: each answer counts once, and only for what was asked."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from fedpeft.config import AdapterSettings, PrivacySettings, TrainingSettings
from fedpeft.errors import EnrolmentError, StickRefused, StorageError
from fedpeft.protocol import CONTENT_KEY, JOB, Job, Payload, SumTerms
from fedpeft.protocol.stick_file import StickFile, parse_stick_file
from fedpeft.sealing import SERVER, Context, Identity, clinic_role, seal
from fedpeft_server.enrolments.enrolment import Enrolments
from fedpeft_server.site.lock import only_server
from fedpeft_server.sticks.carrying import Carrying
from fedpeft_server.sticks.post import StickPost
from tests.server.sites import enrol

SITE, NORTH = Identity.generate(), Identity.generate()
JOB_TEXT = Job(
    run="0" * 32,
    federation="sea",
    fingerprint="a" * 64,
    quantization="none",
    adapter=AdapterSettings(rank=2),
    training=TrainingSettings(),
    aggregation=SumTerms(confidentiality="sealed", adversary="active", bits=16, limit=1.0),
    round=1,
    rounds=2,
)
CENTRAL = PrivacySettings(unit="clinic", mechanism="central", noise_multiplier=1.0)


def place_of(purpose: str = "train", run: int = 7, number: int = 1, attempt: int = 1) -> Context:
    return Context(
        federation="sea",
        run=run,
        round=number,
        attempt=attempt,
        sender=SERVER,
        receiver=clinic_role("north"),
        purpose=purpose,
        schema="ab" * 32,
    )


def work(**changes: object) -> Payload:
    return Payload({JOB: JOB_TEXT.model_copy(update=changes).to_json(), CONTENT_KEY: "00"})


class Office:
    """A server that asks clinic north, and can be started anew on the same folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.told = folder, list[str]()
        self.start()

    def start(self) -> None:
        self.post = StickPost(self.folder, signer=SITE, tell=self.told.append)
        self.post.begin()

    def ask(self, fresh: Context, payload: Payload | None = None) -> str:
        payload = payload or Payload(blob=b"step")
        place = self.post.place("north", fresh, payload)
        sealed = seal(payload.to_bytes(), place, sender=SITE, receiver=NORTH.public)
        return self.post.ask("north", sealed, None)

    def exported(self) -> StickFile:
        ((question, _),) = StickPost(self.folder).waiting().values()
        return question

    def bring(self, answer: StickFile, signer: Identity = NORTH) -> StickFile:
        return StickPost(self.folder).deliver(
            parse_stick_file(answer.to_bytes(signer)), NORTH.public
        )


def answered(question: StickFile) -> StickFile:
    place = question.context.answer()
    return question.answered(sealed=seal(b"done", place, sender=NORTH, receiver=SITE.public))


@pytest.fixture
def office(tmp_path: Path) -> Office:
    return Office(tmp_path)


# What is refused


def test_an_answer_to_nothing_that_was_asked_is_refused(office: Office):
    office.ask(place_of(), work())
    question = office.exported()
    for other in (
        dataclasses.replace(question, question="0" * 64),
        dataclasses.replace(question, context=place_of(number=2)),
    ):
        with pytest.raises(StickRefused, match="is old or foreign"):
            office.bring(other.answered(reason="budget"))


def test_an_answer_that_the_clinic_did_not_sign_is_refused(office: Office):
    found = office.ask(place_of(), work())
    with pytest.raises(StickRefused, match="not signed by clinic north"):
        office.bring(answered(office.exported()), Identity.generate())
    assert office.post.take("north", found) is None


@pytest.mark.parametrize("taken", [False, True])
def test_an_answer_counts_once(office: Office, taken: bool):
    found = office.ask(place_of(), work())
    answer = answered(office.exported())
    office.bring(answer)
    if taken:
        assert office.post.take("north", found) == answer
        assert office.post.take("north", found) is None
    with pytest.raises(StickRefused, match="counts once"):
        office.bring(answer)


def test_an_answer_after_its_time_is_refused(office: Office):
    found = office.ask(place_of(), work())
    question = office.exported()
    office.post.withdraw("north", found)
    assert not StickPost(office.folder).waiting()
    with pytest.raises(StickRefused, match="came too late"):
        office.bring(answered(question))


@pytest.mark.parametrize(
    "again",
    [
        lambda office: office.start(),
        lambda office: office.ask(place_of("train.shares")),
        lambda office: office.ask(place_of("train.keys", attempt=2)),
    ],
)
def test_a_step_of_a_sum_is_void_when_something_else_is_asked(
    office: Office, again: Callable[[Office], object]
):
    found = office.ask(place_of("train.keys"))
    question = office.exported()
    again(office)
    with pytest.raises(StickRefused, match="asked anew"):
        office.bring(answered(question))
    assert office.post.take("north", found) is None


def test_an_answer_that_was_no_good_is_not_handed_out_again(office: Office):
    found = office.ask(place_of(), work())
    office.bring(answered(office.exported()))
    assert office.post.take("north", found)
    office.post.unusable("north", place_of())
    again = office.ask(place_of(attempt=2), work())
    assert again != found
    assert office.exported().context == place_of(attempt=2)


def test_a_damaged_index_is_told(office: Office):
    office.ask(place_of(), work())
    (office.folder / "sticks" / "north" / "index.json").write_text("{")
    with pytest.raises(StorageError, match="is damaged"):
        StickPost(office.folder).waiting()


# What fits


def test_the_answer_to_a_question_of_before_a_restart_fits(office: Office):
    found = office.ask(place_of(run=7), work())
    question = office.exported()
    office.start()
    assert office.post.place("north", place_of(run=8), work()) == place_of(run=7)
    assert office.ask(place_of(run=8), work()) == found
    assert office.exported() == question
    office.bring(answered(question))
    assert office.post.take("north", found) is not None


def test_an_answer_that_came_while_no_server_ran_is_there_for_the_next(office: Office):
    found = office.ask(place_of(run=7), work())
    answer = answered(office.exported())
    office.bring(answer)
    office.start()
    assert office.ask(place_of(run=8), work()) == found
    assert office.post.take("north", found) == answer


def test_an_answer_that_was_counted_serves_a_server_that_was_killed_in_the_round(office: Office):
    found = office.ask(place_of(run=7), work())
    answer = answered(office.exported())
    office.bring(answer)
    assert office.post.take("north", found) == answer
    office.start()
    assert office.ask(place_of(run=8), work()) == found
    assert office.post.take("north", found) == answer
    assert not StickPost(office.folder).waiting()


def test_under_noise_of_the_server_an_answer_is_never_used_twice(office: Office):
    found = office.ask(place_of(run=7), work(privacy=CENTRAL))
    office.bring(answered(office.exported()))
    assert office.post.take("north", found)
    office.start()
    assert office.ask(place_of(run=8), work(privacy=CENTRAL)) != found


def test_a_refusal_is_told_once_and_the_clinic_is_asked_again(office: Office):
    found = office.ask(place_of(), work())
    office.bring(office.exported().answered(reason="outside-hours"))
    answer = office.post.take("north", found)
    assert answer is not None and answer.reason == "outside-hours"
    assert office.ask(place_of(attempt=2), work()) != found


def test_an_answer_after_a_refusal_is_told_from_one_of_a_server_before(office: Office):
    found = office.ask(place_of(), work())
    question = office.exported()
    office.bring(question.answered(reason="outside-hours"))
    assert office.post.take("north", found)
    for late in (question.answered(reason="outside-hours"), answered(question)):
        with pytest.raises(StickRefused, match="after the box said no"):
            office.bring(late)


@pytest.mark.parametrize("changes", [{"round": 2}, {"rounds": 3}, {"asks_verdict": True}], ids=str)
def test_another_job_is_another_question(office: Office, changes: dict[str, object]):
    found = office.ask(place_of(), work())
    assert office.ask(place_of(run=8), work(**changes)) != found


def test_of_one_round_training_and_measuring_are_both_kept_for_a_restart(office: Office):
    first = office.ask(place_of(), work())
    office.bring(answered(office.exported()))
    office.post.take("north", first)
    office.ask(place_of("evaluate"), work())
    question = office.exported()
    office.start()
    assert office.ask(place_of(run=8), work()) == first
    assert office.post.take("north", first)
    office.ask(place_of("evaluate", run=8), work())
    assert office.exported() == question


def test_answers_of_a_round_before_do_not_stay(office: Office):
    found = office.ask(place_of(), work())
    office.bring(answered(office.exported()))
    office.post.take("north", found)
    office.ask(place_of(number=2), work(round=2))
    folder = office.folder / "sticks" / "north"
    assert len([path for path in folder.iterdir() if path.suffix == ".answer"]) == 0
    assert len([path for path in folder.iterdir() if path.suffix == ".question"]) == 1


def test_people_are_told_once_that_a_clinic_is_asked(office: Office):
    office.ask(place_of(), work())
    assert office.told == ["north"]
    assert {path.stat().st_mode & 0o777 for path in (office.folder / "sticks").iterdir()} == {0o700}


# What is said when there is nothing to carry


@pytest.fixture
def enrolments(tmp_path: Path) -> Enrolments:
    found = Enrolments(
        tmp_path / "enrolment.db",
        federation="sea",
        server="localhost:1",
        ca_pem="a certificate",
        identity=SITE.public,
    )
    enrol(found, "north")
    enrol(found, "south")
    return found


def exported(folder: Path, enrolments: Enrolments, *names: str) -> str:
    """Say why nothing is exported for ``names``; "" if something is."""
    (out := folder / "stick").mkdir(exist_ok=True)
    carrying = Carrying(folder, enrolments)
    return "" if carrying.export(names, out) else carrying.why_nothing(names)


def test_why_nothing_is_exported_is_one_sentence_for_each_reason(
    office: Office, enrolments: Enrolments
):
    folder = office.folder
    assert "no clinic is reached by stick" in exported(folder, enrolments)
    enrolments.carry("north", "stick")
    enrolments.carry("south", "stick")
    office.ask(place_of("train.keys"))
    # A step of a sum is worth nothing without the server that asked.
    assert "no server is running" in exported(folder, enrolments)
    with only_server(folder):
        assert not exported(folder, enrolments)
        assert "nothing waits for south: " in exported(folder, enrolments, "south")
        office.bring(answered(office.exported()))
        assert "the answer of north is here already" in exported(folder, enrolments)
        assert "nothing waits for south: " in exported(folder, enrolments, "south")


def test_a_question_without_a_server_is_exported_where_its_answer_will_fit(
    office: Office, enrolments: Enrolments
):
    enrolments.carry("north", "stick")
    office.ask(place_of(), work())
    assert not exported(office.folder, enrolments)


def test_who_is_unknown_and_who_is_on_the_network_are_told_apart(
    office: Office, enrolments: Enrolments
):
    with pytest.raises(EnrolmentError, match="no clinic named 'west' takes part"):
        exported(office.folder, enrolments, "west")
    with pytest.raises(EnrolmentError, match=r"reached by network: .* carrier north stick"):
        exported(office.folder, enrolments, "north")


def test_nothing_is_exported_into_a_folder_that_is_not_there(
    office: Office, enrolments: Enrolments, tmp_path: Path
):
    enrolments.carry("north", "stick")
    office.ask(place_of(), work())
    with pytest.raises(StorageError, match="there is no folder"):
        Carrying(office.folder, enrolments).export([], tmp_path / "unplugged")
    assert not (tmp_path / "unplugged").exists()
