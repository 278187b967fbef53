"""The server's side of a secure sum, without I/O; see ``clinic_side`` for the protocol.

The server relays and adds. Masked vectors are folded in as they arrive and never
kept, so its memory is one vector whatever the number of clinics. What one clinic
sends wrong is refused by itself; the others go on. Must not know Flower or torch.

    keys --> shares --> masked --> check --> unmask --> done
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from fedpeft.config import Adversary
from fedpeft.counts import counted
from fedpeft.errors import (
    BadShare,
    InconsistentLists,
    OtherModelSent,
    OutOfOrder,
    TooFewClinics,
)
from fedpeft.sealing.identity import verify
from fedpeft.secagg.clinic_side import STAGES
from fedpeft.secagg.masking import apply_masks, reduce_width
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
    shares_from_bytes,
    survivors_statement,
)
from fedpeft.secagg.packing import unpack_add
from fedpeft.secagg.pairwise import EphemeralKey, commitment, mask_seed, require_usable
from fedpeft.secagg.quantise import Quantiser
from fedpeft.secagg.session import Session
from fedpeft.secagg.shamir import Interpolation
from fedpeft.secagg.threshold import threshold_of
from fedpeft.secagg.vector import Layout

DONE: Final = "done"


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What the sum is of, and what it demands.

    ``identities`` are the Ed25519 keys (32 bytes) of the clinics that are asked, by
    name; ``threshold`` is what was asked for beyond the floor of ``adversary``;
    ``minimum`` the least number of summands that is of use.
    """

    identities: Mapping[str, bytes]
    adversary: Adversary
    threshold: int | None
    minimum: int
    coordinates: int
    integers: tuple[str, ...]
    quantiser: Quantiser

    def layout(self, clinics: int) -> Layout:
        """Return the layout of a vector that ``clinics`` clinics sum."""
        return Layout(self.coordinates, self.integers, self.quantiser.bits, clinics)


@dataclass(frozen=True, kw_only=True)
class SecureSum:
    """The result: Σ weight·x as float64 (coordinates,), the exact integer sums, and of whom."""

    coordinates: NDArray[np.float64]
    integers: dict[str, int]
    survivors: tuple[str, ...]
    threshold: int
    width: int


@dataclass(frozen=True, slots=True)
class _Step:
    """What the server does in one stage: ask, take in each answer, close."""

    ask: "Callable[[Aggregation], dict[str, bytes]]"
    take: "Callable[[Aggregation, str, bytes], None]"
    close: "Callable[[Aggregation], None]"


class Aggregation:
    """One secure sum; call ``requests``, ``receive`` for each answer, ``close``, five times."""

    def __init__(self, session: Session, terms: Terms) -> None:
        self._session = session
        self._terms = terms
        self._stage = STAGES[0]
        self._answered: set[str] = set()
        self._adverts: dict[str, Advert] = {}
        self._roster: Roster | None = None
        self._shared: dict[int, Shares] = {}
        self._layout: Layout | None = None
        self._accumulator = np.zeros(0, np.uint32)
        self._survivors: set[int] = set()
        self._signatures: dict[int, bytes] = {}
        self._opened: dict[int, tuple[bytes, ...]] = {}
        self._result: SecureSum | None = None

    @property
    def stage(self) -> str:
        """The stage that is open: one of ``STAGES``, or ``DONE``."""
        return self._stage

    @property
    def result(self) -> SecureSum:
        """The sum.

        Raises:
            OutOfOrder: it is not there yet.
        """
        if self._result is None:
            raise OutOfOrder("the secure sum is not finished yet")
        return self._result

    def requests(self) -> dict[str, bytes]:
        """Return what to send in this stage, by clinic."""
        return self._STEPS[self._stage].ask(self) if self._stage in self._STEPS else {}

    def receive(self, name: str, data: bytes) -> None:
        """Take in the answer of the clinic ``name``.

        Raises:
            OutOfOrder: it was not asked in this stage, or has answered.
            AggregationRefused, WrongSignature, BadVector: the answer cannot be used; it
                has changed nothing.
        """
        if self._stage not in self._STEPS or name in self._answered or not self._is_asked(name):
            raise OutOfOrder(f"clinic {name} answers what it was not asked: it is not used")
        self._STEPS[self._stage].take(self, name, data)
        self._answered.add(name)

    def close(self) -> None:
        """End the stage with the answers that came; the next one is open then.

        After an error the whole sum is over, and what was collected is forgotten.

        Raises:
            TooFewClinics: fewer are left than the threshold or the minimum.
            BadShare: a secret cannot be restored; names the clinic.
            BadVector: masks are left in the sum, as somebody sent a false vector.
            OutOfOrder: all stages are over.
        """
        if self._stage not in self._STEPS:
            raise OutOfOrder("the secure sum is over")
        at = STAGES.index(self._stage) + 1
        try:
            self._STEPS[self._stage].close(self)
        except BaseException:
            self._end()
            raise
        if at == len(STAGES):
            self._end()
        else:
            self._answered, self._stage = set(), STAGES[at]

    def _end(self) -> None:
        """Forget what was collected; only the result stays, if there is one."""
        self._stage = DONE
        self._accumulator = np.zeros(0, np.uint32)
        self._shared, self._opened, self._signatures = {}, {}, {}

    def _is_asked(self, name: str) -> bool:
        if self._roster is None:
            return name in self._terms.identities
        return name in self._roster.names and self._roster.place(name) in self._audience()

    def _audience(self) -> Collection[int]:
        """Return the places of those who are asked in this stage."""
        if self._stage == "shares":
            return frozenset(range(len(self._agreed.entries)))
        return self._shared.keys() if self._stage == "masked" else self._survivors

    # keys: everybody may advertise

    def _ask_keys(self) -> dict[str, bytes]:
        return dict.fromkeys(self._terms.identities, b"")

    def _take_keys(self, name: str, data: bytes) -> None:
        advert = Advert.from_bytes(data)
        if advert.hint != self._session.hint:
            raise OtherModelSent(f"clinic {name} answers for another round: it is not used")
        statement = advert_statement(self._session, name, advert.share_key, advert.mask_key)
        signing = self._terms.identities[name]
        verify(signing, advert.signature, statement, source=f"clinic {name}")
        self._require_good_keys(name, advert)
        self._adverts[name] = advert

    def _require_good_keys(self, name: str, advert: Advert) -> None:
        """Refuse from one clinic what would make all the others leave the round."""
        keys = [advert.share_key, advert.mask_key]
        for key in keys:
            require_usable(key, f"clinic {name}")
        taken = [key for each in self._adverts.values() for key in (each.share_key, each.mask_key)]
        if len({*keys, *taken}) != len(keys) + len(taken):
            raise InconsistentLists(f"clinic {name} sent keys that are in use: they are not used")

    def _close_keys(self) -> None:
        terms, clinics = self._terms, len(self._adverts)
        threshold = threshold_of(clinics, terms.adversary, terms.threshold)
        entries = (
            Entry(name, terms.identities[name], self._adverts[name])
            for name in sorted(self._adverts)
        )
        self._roster = Roster(threshold, tuple(entries))
        self._layout = terms.layout(clinics)
        self._require_enough(clinics)

    # shares: everybody gets the roster and shares out its secrets

    def _ask_shares(self) -> dict[str, bytes]:
        return dict.fromkeys(self._agreed.names, self._agreed.to_bytes())

    def _take_shares(self, name: str, data: bytes) -> None:
        shares = Shares.from_bytes(data, len(self._agreed.entries))
        self._shared[self._agreed.place(name)] = shares

    def _close_shares(self) -> None:
        self._require_enough(len(self._shared))
        self._accumulator = np.zeros(self._words.words, np.uint32)

    # masked: those who shared get their shares and send their masked vector

    def _ask_masked(self) -> dict[str, bytes]:
        senders = frozenset(self._shared)
        clinics = len(self._agreed.entries)
        return {
            self._agreed.names[receiver]: Inbox(
                senders,
                tuple(
                    self._shared[sender].boxes[receiver - (receiver > sender)]
                    for sender in sorted(senders - {receiver})
                ),
            ).to_bytes(clinics)
            for receiver in sorted(senders)
        }

    def _take_masked(self, name: str, data: bytes) -> None:
        unpack_add(data, self._accumulator, self._words.width)
        self._survivors.add(self._agreed.place(name))

    def _close_masked(self) -> None:
        self._require_enough(len(self._survivors))

    # check: the survivors sign who they are

    def _ask_check(self) -> dict[str, bytes]:
        listed = Survivors(frozenset(self._survivors)).to_bytes(len(self._agreed.entries))
        return {self._agreed.names[place]: listed for place in sorted(self._survivors)}

    def _take_check(self, name: str, data: bytes) -> None:
        place = self._agreed.place(name)
        statement = survivors_statement(self._session, self._agreed, self._survivors)
        verify(self._agreed.entries[place].signing, data, statement, source=f"clinic {name}")
        self._signatures[place] = data

    def _close_check(self) -> None:
        # The summands are known by now, and who does not sign stays one of them.
        self._require_enough(len(self._signatures), least=self._agreed.threshold)

    # unmask: the survivors open the self masks of survivors and the keys of the dropped

    def _ask_unmask(self) -> dict[str, bytes]:
        survivors = frozenset(self._survivors)
        dropped = frozenset(self._shared) - survivors
        request = Unmasking(survivors, dropped, self._signatures)
        data = request.to_bytes(len(self._agreed.entries))
        return {self._agreed.names[place]: data for place in sorted(survivors)}

    def _take_unmask(self, name: str, data: bytes) -> None:
        shares = shares_from_bytes(data, len(self._shared))
        self._opened[self._agreed.place(name)] = shares

    def _close_unmask(self) -> None:
        self._require_enough(len(self._opened), least=self._agreed.threshold)
        opening = _Opening(self._opened, self._agreed.threshold)
        bound = bound_to(self._session, self._agreed)
        add: list[bytes] = []
        subtract: list[bytes] = []
        for at, place in enumerate(sorted(self._shared)):
            entry, shared = self._agreed.entries[place], self._shared[place]
            if place in self._survivors:

                def is_seed(secret: bytes, expected: bytes = shared.commitment) -> bool:
                    return commitment(secret, bound) == expected

                subtract.append(opening.restore(entry.name, at, is_seed))
            else:

                def is_key(secret: bytes, expected: bytes = entry.advert.mask_key) -> bool:
                    return EphemeralKey(secret).public == expected

                key = EphemeralKey(opening.restore(entry.name, at, is_key))
                self._cancel(place, key, bound, add, subtract)
        apply_masks(self._accumulator, add, subtract)
        self._result = self._decoded()

    def _cancel(
        self, place: int, key: EphemeralKey, bound: bytes, add: list[bytes], subtract: list[bytes]
    ) -> None:
        """Take the masks that survivors share with a dropped clinic out of the sum."""
        name = self._agreed.names[place]
        for other in sorted(self._survivors):
            entry = self._agreed.entries[other]
            seed = mask_seed(key, entry.advert.mask_key, bound, (name, entry.name))
            # The survivor added the mask if the dropped clinic comes after it.
            (subtract if place > other else add).append(seed)

    def _decoded(self) -> SecureSum:
        layout, coordinates = self._words, self._terms.coordinates
        sums = self._accumulator
        reduce_width(sums, layout.width)
        return SecureSum(
            coordinates=self._terms.quantiser.dequantise(sums[:coordinates], len(self._survivors)),
            integers=layout.decode_integers(sums[coordinates:]),
            survivors=tuple(self._agreed.names[place] for place in sorted(self._survivors)),
            threshold=self._agreed.threshold,
            width=layout.width,
        )

    def _require_enough(self, count: int, least: int | None = None) -> None:
        """Check before the next stage; clinics check the threshold for themselves."""
        if least is None:
            least = max(self._agreed.threshold, self._terms.minimum)
        if count < least:
            raise TooFewClinics(
                f"{counted(count, 'clinic is', 'clinics are')} left in the step {self._stage!r} of "
                f"the secure aggregation where {least} are needed: nothing was revealed"
            )

    @property
    def _agreed(self) -> Roster:
        if self._roster is None:
            raise OutOfOrder("the clinics have not advertised their keys yet")
        return self._roster

    @property
    def _words(self) -> Layout:
        if self._layout is None:
            raise OutOfOrder("the clinics have not advertised their keys yet")
        return self._layout

    # The one place that says what happens in which stage.
    _STEPS: ClassVar[Mapping[str, _Step]] = {
        "keys": _Step(_ask_keys, _take_keys, _close_keys),
        "shares": _Step(_ask_shares, _take_shares, _close_shares),
        "masked": _Step(_ask_masked, _take_masked, _close_masked),
        "check": _Step(_ask_check, _take_check, _close_check),
        "unmask": _Step(_ask_unmask, _take_unmask, _close_unmask),
    }


class _Opening:
    """Restores secrets from opened shares, and works around a clinic that opened false ones."""

    def __init__(self, opened: Mapping[int, tuple[bytes, ...]], threshold: int) -> None:
        self._opened = opened
        self._groups = list(_groups(sorted(opened), threshold))
        self._ready: dict[tuple[int, ...], Interpolation] = {}

    def restore(self, name: str, at: int, is_right: Callable[[bytes], bool]) -> bytes:
        """Return the secret whose shares stand at ``at``.

        Raises:
            BadShare: no group of openers that was tried restores it.
        """
        for group in self._groups:
            try:
                secret = self._interpolation(group).combine(
                    {place + 1: self._opened[place][at] for place in group}
                )
            except BadShare:
                continue
            if is_right(secret):
                return secret
        raise BadShare(
            f"the shares of clinic {name} do not restore its secret: it shared out false ones, or "
            "more clinics than can be worked around gave false ones back; the sum is dropped"
        )

    def _interpolation(self, group: tuple[int, ...]) -> Interpolation:
        if group not in self._ready:
            self._ready[group] = Interpolation([place + 1 for place in group])
        return self._ready[group]


def _groups(openers: Sequence[int], threshold: int) -> "list[tuple[int, ...]]":
    """Return groups of ``threshold`` openers: the first, then one without each of the first.

    One opener with false shares is worked around if there is one more than needed.
    """
    first, spare = openers[:threshold], openers[threshold:]
    without = (
        (*(each for each in first if each != left_out), spare[0]) for left_out in first if spare
    )
    return [tuple(first), *without]
