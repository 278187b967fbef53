"""What a strategy needs and gives: a run is checked against it, and a table made of it."""

from dataclasses import dataclass, field
from typing import Literal

from fedpeft.config import PrivacyMechanism

RankRule = Literal["same", "nested", "truncated", "stacked"]
"""How clinics of a lower rank take part: not at all; training the first columns over the
rest, frozen; training the first columns alone; or stacked beside the others'."""


@dataclass(frozen=True, kw_only=True)
class Declaration:
    """One strategy.

    ``exact`` says whether the next product BA is the mean of the clinics' products.
    ``linear``: it needs no more than the weighted sum of the updates, so that secure
    aggregation is possible; otherwise the server must open each update. ``changes_base``:
    what is learnt goes into the base model's weights. ``up`` and ``down`` are parameters a
    round in P = r(d + k), of which A has rk and B has dr, for n clinics. ``mechanisms``
    are those of differential privacy that it keeps. ``personal``: a part of the adapter
    stays on each box. ``tolerates`` says how many of n clinics may send anything.
    ``wraps`` names what a wrapper can be laid around, the default first.
    """

    name: str
    what: str
    source: str
    exact: Literal["yes", "no", "to rank r"]
    linear: bool
    up: str
    down: str
    ranks: RankRule = "same"
    changes_base: bool = False
    personal: bool = False
    mechanisms: frozenset[PrivacyMechanism] = field(
        default_factory=lambda: frozenset[PrivacyMechanism](("local",))
    )
    tolerates: str = ""
    wraps: tuple[str, ...] = ()
