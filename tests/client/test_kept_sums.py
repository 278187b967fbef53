"""A secure sum over restarts of the box: it goes on, and no step is ever answered twice."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from fedpeft.errors import AlreadyAggregated, FedpeftError, OutOfOrder, StorageError
from fedpeft.protocol.sums import from_fixed_point
from fedpeft.sealing import SERVER, Context, Identity, clinic_role
from fedpeft.secagg import STAGES
from fedpeft.secagg.messages import Inbox, Roster, Survivors, Unmasking
from fedpeft_client.rounds.clinic import Clinic, Membership
from fedpeft_client.settings import ConfidentialitySettings, DataSettings
from fedpeft_client.sums.kept_sum import SumFolder
from fedpeft_client.sums.opened_sums import OpenedSums
from fedpeft_client.sums.summing import SecureSums
from tests.client.test_summing import IDENTITIES, OWNER, SCHEMA, World, rows_of, trained, update_of

RANKS: dict[str, int] = {"c0": 4, "c1": 4, "c2": 4, "c3": 4}


def clinic_in(folder: Path | None, name: str) -> Clinic:
    return Clinic(
        name=name,
        federation="sea",
        membership=Membership(IDENTITIES[name], OWNER.public),
        model=Path("model"),
        data=DataSettings(train=Path("t.jsonl")),
        ledger=Path("ledger.sqlite"),
        aggregation=ConfidentialitySettings(adversary="curious"),
        sums_directory=folder and folder / name,
    )


def context_of(name: str, stage: str, attempt: int = 1) -> Context:
    return Context(
        federation="sea",
        run=1,
        round=1,
        attempt=attempt,
        sender=SERVER,
        receiver=clinic_role(name),
        purpose=f"train.{stage}",
        schema=SCHEMA.hash,
    )


class Restarted(World):
    """A world whose boxes are started anew before every step."""

    def __init__(self, folder: Path) -> None:
        super().__init__(RANKS)
        self.folder = folder
        self.requests: dict[str, dict[str, bytes]] = {}

    def ask(self, name: str, request: bytes) -> bytes:
        stage = self.server.stage
        self.requests.setdefault(name, {})[stage] = request
        clinic, sums = clinic_in(self.folder, name), SecureSums(lambda _clinic, _peers: None)
        if stage == STAGES[0]:
            found = trained(update_of(name), rows_of(name))
            return sums.begin(clinic, context_of(name, stage), self.assignment, found)
        return sums.go_on(clinic, context_of(name, stage), stage, request)

    def again(self, name: str, stage: str, request: bytes, attempt: int = 1) -> bytes:
        """Ask a box that was just started for a step."""
        sums = SecureSums(lambda _clinic, _peers: None)
        return sums.go_on(
            clinic_in(self.folder, name), context_of(name, stage, attempt), stage, request
        )


# What is refused


@pytest.mark.parametrize("stage", STAGES[1:])
def test_no_step_gets_two_answers_over_a_restart(tmp_path: Path, stage: str):
    world = Restarted(tmp_path)
    world.until(stage)
    request = world.server.requests()["c1"]
    answer = world.again("c1", stage, request)
    assert world.again("c1", stage, request) == answer
    for other in (request + b"\0", request[:-1]):
        with pytest.raises(OutOfOrder):
            world.again("c1", stage, other)


def test_an_answer_of_before_is_not_given_to_another_attempt(tmp_path: Path):
    world = Restarted(tmp_path)
    world.until("masked")
    request = world.server.requests()["c1"]
    world.again("c1", "masked", request)
    with pytest.raises(FedpeftError, match="another secure sum"):
        world.again("c1", "masked", request, attempt=2)


def test_a_restarted_box_never_reveals_both_shares_of_a_clinic(tmp_path: Path):
    world = Restarted(tmp_path)
    world.until("unmask")
    request = world.server.requests()["c1"]
    answer = world.again("c1", "unmask", request)
    asked = Unmasking.from_bytes(request, 4)
    place = min(asked.survivors - {1})
    other = dataclasses.replace(
        asked, survivors=asked.survivors - {place}, dropped=asked.dropped | {place}
    )
    with pytest.raises(OutOfOrder):
        world.again("c1", "unmask", other.to_bytes(4))
    assert world.again("c1", "unmask", request) == answer  # nothing that had not left


def test_a_restarted_box_signs_no_second_list_of_survivors(tmp_path: Path):
    world = Restarted(tmp_path)
    world.until("check")
    world.step()
    fewer = Survivors(frozenset({0, 1, 2})).to_bytes(4)
    with pytest.raises(OutOfOrder):
        world.again("c1", "check", fewer)


def test_a_refused_step_ends_the_sum_over_a_restart_too(tmp_path: Path):
    world = Restarted(tmp_path)
    world.until("masked")
    request = world.server.requests()["c1"]
    inbox = Inbox.from_bytes(request, 4)
    boxes = (bytes(len(inbox.boxes[0])), *inbox.boxes[1:])
    with pytest.raises(FedpeftError):
        world.again("c1", "masked", dataclasses.replace(inbox, boxes=boxes).to_bytes(4))
    with pytest.raises(OutOfOrder, match="did not begin, or has left"):
        world.again("c1", "masked", request)


def test_a_kept_sum_does_not_take_a_message_of_another_attempt(tmp_path: Path):
    world = Restarted(tmp_path)
    world.until("shares")
    with pytest.raises(FedpeftError, match="another secure sum"):
        world.again("c1", "shares", world.server.requests()["c1"], attempt=2)


def test_of_a_sum_kept_for_another_identity_nothing_is_used(tmp_path: Path):
    world = Restarted(tmp_path)
    world.until("shares")
    clinic = clinic_in(tmp_path, "c1")
    other = dataclasses.replace(clinic, membership=Membership(Identity.generate(), OWNER.public))
    with pytest.raises(OutOfOrder):
        SecureSums(lambda _clinic, _peers: None).go_on(
            other, context_of("c1", "shares"), "shares", world.server.requests()["c1"]
        )


def test_nothing_leaves_that_could_not_be_kept(tmp_path: Path):
    world = Restarted(tmp_path)
    world.until("shares")
    (tmp_path / "c1").chmod(0o500)
    try:
        if _can_write(tmp_path / "c1"):
            pytest.skip("this user may write everywhere")
        with pytest.raises(StorageError):
            world.again("c1", "shares", world.server.requests()["c1"])
    finally:
        (tmp_path / "c1").chmod(0o700)


def _can_write(folder: Path) -> bool:
    try:
        (folder / "probe").touch()
    except PermissionError:
        return False
    (folder / "probe").unlink()
    return True


# What goes on


def test_a_sum_goes_on_over_restarts_before_every_step(tmp_path: Path):
    kept, live = Restarted(tmp_path).all(), World(RANKS).all()
    assert kept.integers == live.integers
    # Rounding to the grid is random, by less than a step for each clinic.
    assert abs(kept.coordinates - live.coordinates).max() < 1e-3
    assert from_fixed_point(kept.integers["nll"]) == from_fixed_point(live.integers["nll"])


def test_nothing_of_a_sum_stays_on_the_disk(tmp_path: Path):
    world = Restarted(tmp_path)
    world.until("check")
    assert sorted(path.name for path in (tmp_path / "c1").iterdir()) == ["sum"]
    world.all()
    assert sorted(path.name for path in (tmp_path / "c1").iterdir()) == ["opened.json", "sum"]
    kept = SumFolder(clinic_in(tmp_path, "c1"))
    assert kept.read() is None  # only the last answer is left, which went to the server
    assert kept.last_answer() is not None


def test_a_sum_lies_encrypted_and_for_its_owner_alone(tmp_path: Path):
    world = Restarted(tmp_path)
    world.until("shares")
    files = sorted((tmp_path / "c1").iterdir())
    assert [path.name for path in files] == ["sum", "values"]
    data = b"".join(path.read_bytes() for path in files)
    assert not any(word in data for word in (b"self_seed", b"sea", b"weight", b"share_key"))
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}


def test_the_roster_is_the_one_that_was_sent(tmp_path: Path):
    world = Restarted(tmp_path)
    world.until("masked")
    sent = Roster.from_bytes(world.requests["c1"]["shares"])
    kept = SecureSums(lambda _clinic, _peers: None)._begun(clinic_in(tmp_path, "c1"))
    assert kept.session.kept().roster == sent


# Which sums were opened


def test_a_sum_that_was_opened_is_not_begun_again_after_a_restart(tmp_path: Path):
    Restarted(tmp_path).all()
    sums, clinic = SecureSums(lambda _clinic, _peers: None), clinic_in(tmp_path, "c1")
    with pytest.raises(AlreadyAggregated):
        sums.require_new(clinic, context_of("c1", "keys", attempt=2), "train")
    sums.require_new(clinic, context_of("c1", "keys"), "evaluate")


def test_a_kill_right_after_the_last_step_does_not_lose_that(tmp_path: Path):
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from fedpeft_client.sums.opened_sums import OpenedSums\n"
        "OpenedSums(Path(sys.argv[1])).note(7, 'train', 3)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    path = tmp_path / "opened.json"
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert done.returncode == -9
    opened = OpenedSums(path)
    assert opened.has(7, "train", 3)
    assert not any((opened.has(7, "train", 2), opened.has(7, "evaluate", 3), opened.has(8, "t", 3)))


@pytest.mark.parametrize("content", ["", "[]", '{"schema": 2, "opened": {}}', '{"schema": 1}'])
def test_a_box_that_cannot_know_what_it_opened_takes_no_part(tmp_path: Path, content: str):
    path = tmp_path / "opened.json"
    path.write_text(content)
    with pytest.raises(StorageError, match="does not know which sums"):
        OpenedSums(path).has(1, "train", 1)
    with pytest.raises(StorageError):
        OpenedSums(path).note(1, "train", 1)
