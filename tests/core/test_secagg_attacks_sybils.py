"""A malicious server with clinics of its own: up to a third of them open no other update."""

import pytest

from fedpeft.errors import (
    InconsistentLists,
    TooFewClinics,
)
from fedpeft.secagg.masking import apply_masks, reduce_width
from fedpeft.secagg.messages import (
    Inbox,
    Survivors,
    Unmasking,
    bound_to,
    survivors_statement,
)
from fedpeft.secagg.pairwise import EphemeralKey, mask_seed
from fedpeft.secagg.shamir import combine

VICTIM = "c001"


def inbox_of(world, name: str = VICTIM) -> Inbox:
    return Inbox.from_bytes(world.until("masked")[name], len(world.names))


# the server's own clinics


class Fork:
    """The server and its own clinics against c000: one list with it, one without.

    ``told_alive`` honest clinics are shown the first list, the others the second. The
    server's clinics sign both lists and give all shares that they hold.
    """

    def __init__(self, world, sybils: int, told_alive: int, *, all_signatures: bool):
        self.world, self.clinics = world, len(world.names)
        world.until("check")
        honest = range(1, self.clinics - sybils)
        self.sybils = range(self.clinics - sybils, self.clinics)
        everybody = frozenset(range(self.clinics))
        groups = [(0, *honest[:told_alive]), tuple(honest[told_alive:])]
        lists = [everybody, everybody - {0}]
        signed = [self._signed(*each) for each in zip(groups, lists, strict=True)]
        self.answers: list[dict[int, bytes]] = []
        for at, (group, listed) in enumerate(zip(groups, lists, strict=True)):
            vouched = {**signed[1 - at], **signed[at]} if all_signatures else signed[at]
            vouched = {place: it for place, it in vouched.items() if place in listed}
            self.answers.append(self._unmasked(group, listed, everybody - listed, vouched))

    def _signed(self, group, listed: frozenset[int]) -> dict[int, bytes]:
        world = self.world
        statement = survivors_statement(world.session, world.server._agreed, listed)
        data = Survivors(listed).to_bytes(self.clinics)
        asked = {at: world.clinics[world.names[at]].receive("check", data) for at in group}
        own = {at: world.identities[world.names[at]].sign(statement) for at in self.sybils}
        return {**asked, **own}

    def _unmasked(self, group, listed, dropped, vouched) -> dict[int, bytes]:
        data = Unmasking(listed, dropped, vouched).to_bytes(self.clinics)
        answers: dict[int, bytes] = {}
        for place in group:
            clinic = self.world.clinics[self.world.names[place]]
            try:
                answers[place] = clinic.receive("unmask", data)
            except (TooFewClinics, InconsistentLists):
                self.world.assert_over(clinic)
        return answers

    def shares(self, of_seed: int) -> dict[int, bytes]:
        """Return the server's shares of the victim's mask key (0) or self-mask seed (1)."""
        opened = self.answers[0 if of_seed else 1]
        found = {place + 1: answer[:33] for place, answer in opened.items()}
        for place in self.sybils:
            found[place + 1] = self.world.secrets[self.world.names[place]].shares[0][of_seed]
        return found

    @property
    def reveals(self) -> bool:
        threshold = self.world.server._agreed.threshold
        return all(len(self.shares(which)) >= threshold for which in (0, 1))


@pytest.mark.parametrize("all_signatures", [False, True])
@pytest.mark.parametrize("clinics", range(4, 14))
def test_a_third_of_the_clinics_cannot_open_another_ones_update(
    make_world, clinics: int, all_signatures: bool
):
    sybils = (clinics - 1) // 3
    for told_alive in range(clinics - sybils):
        fork = Fork(make_world(clinics), sybils, told_alive, all_signatures=all_signatures)
        assert not fork.reveals


def test_the_servers_clinics_may_help_it_to_the_sum(make_world):
    """By telling everybody the same: that is what it may learn."""
    fork = Fork(make_world(7), 2, 4, all_signatures=False)
    assert len(fork.shares(1)) == 7
    assert len(fork.shares(0)) == 2


def test_the_same_attack_succeeds_against_a_threshold_that_trusts_the_server(make_world):
    """So it is the threshold that stops it, and the tests above do attack."""
    world = make_world(9, adversary="curious")
    fork = Fork(world, 3, 2, all_signatures=False)
    assert fork.reveals
    seed, key = (combine(dict(sorted(fork.shares(which).items())[:5])) for which in (1, 0))
    roster = world.server._agreed
    bound = bound_to(world.session, roster)
    pairs = [
        mask_seed(EphemeralKey(key), entry.advert.mask_key, bound, ("c000", entry.name))
        for entry in roster.entries[1:]
    ]
    words = world.updates["c000"].masked_words()
    apply_masks(words, [], [seed, *pairs])
    reduce_width(words, world.updates["c000"].layout.width)
    assert words.tolist() == world.updates["c000"].words().tolist()


@pytest.mark.parametrize("asked", [True, False])
def test_masks_with_few_clinics_do_not_help_to_single_one_out(make_world, asked: bool):
    """The victim masks with two honest clinics only, which the server then calls dropped."""
    world = make_world(7)
    requests = world.until("masked")
    inbox = inbox_of(world, "c000")
    told = Inbox(frozenset({0, 1, 2, 5, 6}), tuple(inbox.boxes[at - 1] for at in (1, 2, 5, 6)))
    world.clinics["c000"].receive("masked", told.to_bytes(7))
    for name in ("c003", "c004"):
        world.clinics[name].receive("masked", requests[name])
    listed = frozenset({0, 3, 4, 5, 6})
    data = Survivors(listed).to_bytes(7)
    if asked:
        world.assert_refused("c000", "check", data, InconsistentLists)
        return
    statement = survivors_statement(world.session, world.server._agreed, listed)
    signatures = {at: world.clinics[f"c{at:03d}"].receive("check", data) for at in (3, 4)}
    signatures |= {at: world.identities[f"c{at:03d}"].sign(statement) for at in (5, 6)}
    request = Unmasking(listed, frozenset({1, 2}), signatures).to_bytes(7)
    for name in ("c003", "c004"):
        world.assert_refused(name, "unmask", request, TooFewClinics)


@pytest.mark.parametrize("sybils", [1, 2])
def test_survivors_below_the_threshold_are_refused_whatever_the_servers_clinics_sign(
    make_world, sybils: int
):
    world = make_world(7)
    world.until("check")
    listed = frozenset({1, *range(7 - sybils, 7)})
    data = Survivors(listed).to_bytes(7)
    world.assert_refused(VICTIM, "check", data, TooFewClinics)
