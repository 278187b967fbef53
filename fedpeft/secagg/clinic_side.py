"""A clinic's side of a secure sum, without I/O: bytes in, bytes out, or a refusal.

Bonawitz et al. 2017 (doi:10.1145/3133956.3133982), the form for an active
adversary: signed keys, shares under pairwise keys, a signed list of survivors
before anything is opened. The clinic trusts nothing that the server says about
who takes part. Must not know Flower, torch or files.

    READY --advertise--> ADVERTISED --Roster--> SHARED --Inbox--> MASKED
          --Survivors--> CHECKED --Unmasking--> UNMASKED

A message out of order changes nothing. A message in order that is refused ends
the session: its secrets are forgotten, and no later message gets an answer.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from enum import Enum, auto
from typing import Final, Protocol

from fedpeft.config import LEAST_SUMMANDS, Adversary
from fedpeft.errors import (
    AggregationRefused,
    InconsistentLists,
    OtherModelSent,
    OutOfOrder,
    TooFewClinics,
    WrongSignature,
)
from fedpeft.sealing import Identity
from fedpeft.sealing.identity import verify
from fedpeft.secagg.kept_session import KeptSession, Secrets
from fedpeft.secagg.messages import (
    Advert,
    Entry,
    Inbox,
    Roster,
    Shares,
    Survivors,
    Unmasking,
    advert_statement,
    bound_to,
    shares_to_bytes,
    survivors_statement,
)
from fedpeft.secagg.pairwise import commitment, lock, mask_seed, require_usable, unlock
from fedpeft.secagg.session import Session
from fedpeft.secagg.shamir import SHARE_BYTES, split
from fedpeft.secagg.threshold import require_safe


class State(Enum):
    """How far a session has come."""

    READY = auto()
    ADVERTISED = auto()
    SHARED = auto()
    MASKED = auto()
    CHECKED = auto()
    UNMASKED = auto()
    ENDED = auto()


STAGES: Final = ("keys", "shares", "masked", "check", "unmask")
"""The server's five requests in order, as the last part of their message types."""


class Contribution(Protocol):
    """What a clinic adds to the sum; it is masked where it is made."""

    def masked(self, clinics: int, add: Sequence[bytes], subtract: Sequence[bytes]) -> bytes:
        """Return the packed vector for a sum of ``clinics``, masks from these seeds applied."""
        ...


AdmitPeers = Callable[[Mapping[str, bytes]], object]
"""Told name and Ed25519 key of the other clinics; raises to refuse one (UnknownPeer)."""
AgreeToSum = Callable[[Collection[str]], object]
"""Told the names of all clinics of a sum; raises to refuse it (TooFewClinics)."""


def _always(_clinics: Collection[str]) -> None:
    return


class ClinicSession:
    """One clinic in one session; see the module for the order of events."""

    def __init__(
        self,
        session: Session,
        name: str,
        identity: Identity,
        contribution: Contribution | None,
        *,
        adversary: Adversary,
        admit: AdmitPeers,
        least: int = 0,
        agree: AgreeToSum = _always,
        kept: KeptSession | None = None,
    ) -> None:
        """Begin, or go on from what was ``kept``.

        ``least`` is how many clinics the sum must have beyond what is always asked.
        ``agree`` is asked about the clinics of the sum before anything is masked, and
        again before anything is opened. ``contribution`` is None once it was masked.
        """
        self._session = session
        self._name = name
        self._identity = identity
        self._contribution = contribution
        self._adversary: Adversary = adversary
        self._admit = admit
        self._least = max(least, LEAST_SUMMANDS)
        self._agree = agree
        self._state = State.READY if kept is None else State[kept.state]
        self._secrets: Secrets | None = Secrets() if kept is None else kept.secrets
        self._roster = None if kept is None else kept.roster
        self._senders: frozenset[int] = frozenset() if kept is None else kept.senders
        self._survivors: frozenset[int] = frozenset() if kept is None else kept.survivors

    @property
    def state(self) -> State:
        """How far the session has come."""
        return self._state

    @property
    def session(self) -> Session:
        """What the sum is about."""
        return self._session

    def kept(self) -> KeptSession:
        """Return what a later process needs to go on; secret, and all but the contribution.

        Raises:
            OutOfOrder: the session is over.
        """
        return KeptSession(
            state=self._state.name,
            secrets=self._kept,
            roster=self._roster,
            senders=self._senders,
            survivors=self._survivors,
        )

    def receive(self, stage: str, data: bytes) -> bytes:
        """Answer the server's request of ``stage``; ``data`` is empty for ``keys``.

        Raises:
            OutOfOrder: another stage comes next; nothing has changed.
            AggregationRefused, WrongSignature: the request must not be answered; the
                session is over.
        """
        step = _TRANSITIONS.get((self._state, stage))
        if step is None:
            raise OutOfOrder(
                f"the server asks for the step {stage!r} of the secure aggregation when it is not "
                "due: nothing is answered"
            )
        handler, after = step
        # Ended until the answer is made: no step is ever taken twice, however it stops.
        self._state = State.ENDED
        try:
            answer = handler(self, data)
        except BaseException:
            self.end()
            raise
        self._state = after
        return answer

    def end(self) -> None:
        """Forget all secrets; nothing is answered any more."""
        self._state = State.ENDED
        self._secrets = self._contribution = None

    def _advertise(self, data: bytes) -> bytes:
        if data:
            raise AggregationRefused("the server's first request carries something unexpected")
        share_key, mask_key = self._kept.share_key.public, self._kept.mask_key.public
        statement = advert_statement(self._session, self._name, share_key, mask_key)
        signature = self._identity.sign(statement)
        self._kept.advert = Advert(self._session.hint, share_key, mask_key, signature)
        return self._kept.advert.to_bytes()

    def _share(self, data: bytes) -> bytes:
        roster = Roster.from_bytes(data)
        clinics = len(roster.entries)
        require_safe(roster.threshold, clinics, self._adversary)
        self._require_own_entry(roster)
        others = [entry for entry in roster.entries if entry.name != self._name]
        for entry in others:
            self._verify(entry)
        self._admit({entry.name: entry.signing for entry in others})
        self._roster, self._kept.bound = roster, bound_to(self._session, roster)
        return self._split(roster).to_bytes()

    def _require_own_entry(self, roster: Roster) -> None:
        entry = next((each for each in roster.entries if each.name == self._name), None)
        own = Entry(self._name, self._identity.public.signing_bytes, self._advertised)
        if entry != own:
            raise InconsistentLists(
                "the server's list of clinics does not hold this clinic's own keys as it sent "
                "them: the round is left"
            )
        signing = [each.signing for each in roster.entries]
        adverts = [each.advert for each in roster.entries]
        keys = [key for advert in adverts for key in (advert.share_key, advert.mask_key)]
        if len(signing) != len(set(signing)) or len(keys) != len(set(keys)):
            raise InconsistentLists(
                "the server's list gives two clinics the same keys: the round is left"
            )

    @property
    def _advertised(self) -> Advert:
        if self._kept.advert is None:
            raise _over()
        return self._kept.advert

    def _verify(self, entry: Entry) -> None:
        if entry.advert.hint != self._session.hint:
            raise OtherModelSent(
                f"clinic {entry.name} works on another adapter, job or round than this one: the "
                "server sent the clinics different things; the round is left"
            )
        advert = entry.advert
        statement = advert_statement(self._session, entry.name, advert.share_key, advert.mask_key)
        verify(entry.signing, advert.signature, statement, source=f"clinic {entry.name}")
        for key in (advert.share_key, advert.mask_key):
            require_usable(key, f"clinic {entry.name}")

    def _split(self, roster: Roster) -> Shares:
        """Share out the private mask key and the seed of the self mask, a box for each other."""
        points = range(1, len(roster.entries) + 1)
        keys = split(self._kept.mask_key.private, roster.threshold, points)
        seeds = split(self._kept.self_seed, roster.threshold, points)
        own = roster.place(self._name)
        self._kept.shares[own] = (keys[own + 1], seeds[own + 1])
        boxes = tuple(
            lock(
                self._kept.share_key,
                entry.advert.share_key,
                self._kept.bound,
                self._name,
                entry.name,
                keys[place + 1] + seeds[place + 1],
            )
            for place, entry in enumerate(roster.entries)
            if place != own
        )
        return Shares(commitment(self._kept.self_seed, self._kept.bound), boxes)

    def _mask(self, data: bytes) -> bytes:
        roster = self._agreed
        inbox = Inbox.from_bytes(data, len(roster.entries))
        own = roster.place(self._name)
        if own not in inbox.senders:
            raise InconsistentLists(
                "the server leaves this clinic out of those that shared: the round is left"
            )
        self._require_enough(inbox.senders, "shared")
        self._agree(self._names(inbox.senders))
        others = sorted(inbox.senders - {own})
        for place, box in zip(others, inbox.boxes, strict=True):
            entry = roster.entries[place]
            content = unlock(
                self._kept.share_key,
                entry.advert.share_key,
                self._kept.bound,
                entry.name,
                self._name,
                box,
            )
            if len(content) != 2 * SHARE_BYTES:
                raise AggregationRefused(f"clinic {entry.name} shared something unreadable")
            self._kept.shares[place] = (content[:SHARE_BYTES], content[SHARE_BYTES:])
        self._senders = inbox.senders
        return self._masked(roster, own, others)

    def _masked(self, roster: Roster, own: int, others: Sequence[int]) -> bytes:
        if self._contribution is None:
            raise _over()
        seeds = {
            place: mask_seed(
                self._kept.mask_key,
                roster.entries[place].advert.mask_key,
                self._kept.bound,
                (self._name, roster.entries[place].name),
            )
            for place in others
        }
        add = [self._kept.self_seed, *(seeds[place] for place in others if place > own)]
        subtract = [seeds[place] for place in others if place < own]
        masked = self._contribution.masked(len(roster.entries), add, subtract)
        self._contribution = None
        return masked

    def _check(self, data: bytes) -> bytes:
        roster = self._agreed
        members = Survivors.from_bytes(data, len(roster.entries)).members
        if roster.place(self._name) not in members or not members <= self._senders:
            raise InconsistentLists(
                "the server's list of survivors leaves this clinic out, or names one that shared "
                "nothing: the round is left"
            )
        self._require_enough(members, "survived")
        self._agree(self._names(members))
        self._survivors = members
        return self._identity.sign(survivors_statement(self._session, roster, members))

    def _unmask(self, data: bytes) -> bytes:
        roster = self._agreed
        request = Unmasking.from_bytes(data, len(roster.entries))
        if request.survivors & request.dropped:
            raise InconsistentLists(
                "the server lists a clinic both as alive and as dropped, which would open its "
                "update: the round is left"
            )
        if (
            request.survivors != self._survivors
            or request.dropped != self._senders - self._survivors
        ):
            raise InconsistentLists(
                "the server asks to unmask another list of survivors than the one that this clinic "
                "signed: the round is left"
            )
        self._require_signed(roster, request)
        shares = [
            self._kept.shares[place][1 if place in request.survivors else 0]
            for place in sorted(self._senders)
        ]
        self._secrets = None
        return shares_to_bytes(shares)

    def _require_signed(self, roster: Roster, request: Unmasking) -> None:
        if not request.signatures.keys() <= request.survivors:
            raise InconsistentLists(
                "a clinic that is no survivor vouches for the list of survivors: the round is left"
            )
        self._require_enough(request.signatures.keys(), "vouched for the survivors")
        statement = survivors_statement(self._session, roster, request.survivors)
        for place, signature in request.signatures.items():
            entry = roster.entries[place]
            try:
                verify(entry.signing, signature, statement, source=f"clinic {entry.name}")
            except WrongSignature:
                raise InconsistentLists(
                    f"clinic {entry.name} did not sign the list of survivors that the server sent "
                    "this clinic: the round is left"
                ) from None

    def _require_enough(self, members: Collection[int], what: str) -> None:
        least = max(self._agreed.threshold, self._least)
        if len(members) < least:
            raise TooFewClinics(
                f"{len(members)} clinics {what} where the threshold of the secure aggregation is "
                f"{least}: this clinic reveals nothing"
            )

    def _names(self, members: Collection[int]) -> list[str]:
        return [self._agreed.names[place] for place in sorted(members)]

    @property
    def _kept(self) -> Secrets:
        if self._secrets is None:
            raise _over()
        return self._secrets

    @property
    def _agreed(self) -> Roster:
        if self._roster is None:
            raise _over()
        return self._roster


def _over() -> OutOfOrder:
    return OutOfOrder("this session of the secure aggregation is over: nothing is answered")


_Handler = Callable[[ClinicSession, bytes], bytes]
# One table says everything about order; the handlers only about content.
_TRANSITIONS: Final[dict[tuple[State, str], tuple[_Handler, State]]] = {
    (State.READY, "keys"): (ClinicSession._advertise, State.ADVERTISED),  # pyright: ignore[reportPrivateUsage]
    (State.ADVERTISED, "shares"): (ClinicSession._share, State.SHARED),  # pyright: ignore[reportPrivateUsage]
    (State.SHARED, "masked"): (ClinicSession._mask, State.MASKED),  # pyright: ignore[reportPrivateUsage]
    (State.MASKED, "check"): (ClinicSession._check, State.CHECKED),  # pyright: ignore[reportPrivateUsage]
    (State.CHECKED, "unmask"): (ClinicSession._unmask, State.UNMASKED),  # pyright: ignore[reportPrivateUsage]
}
