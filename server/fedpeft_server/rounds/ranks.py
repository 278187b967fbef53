"""At which rank each clinic takes part, where clinics differ in what they can train."""

from collections import Counter
from collections.abc import Collection, Mapping

from fedpeft.config import LEAST_SUMMANDS
from fedpeft.protocol import RankTerms
from fedpeft_strategies.declaration import RankRule


class RankPlan:
    """What the clinics of one run can train; ``rank`` is the adapter's.

    ``hidden``: only sums are seen, so that what fewer than ``LEAST_SUMMANDS`` clinics
    train would show single updates.
    """

    def __init__(self, rule: RankRule, rank: int, *, hidden: bool) -> None:
        self._rule: RankRule = rule
        self._rank = rank
        self._hidden = hidden
        self._largest: dict[str, int] = {}

    def heard(self, largest: Mapping[str, int]) -> None:
        """Take over what clinics report: the largest rank that each trains."""
        self._largest |= largest

    def terms(self, clinics: Collection[str]) -> RankTerms | None:
        """Return the ranks of a round of ``clinics``; None if all take part at the adapter's."""
        rule = self._rule
        if rule == "same" or not clinics:
            return None  # a clinic that cannot train the adapter's rank refuses
        # Of a clinic that was not heard of yet, no more is asked than of any other.
        new = min(self._largest.values(), default=self._rank)
        able = {name: min(self._rank, self._largest.get(name, new)) for name in clinics}
        if all(rank == self._rank for rank in able.values()):
            return None
        ranks = _shared(able) if self._hidden else able
        if all(rank == self._rank for rank in ranks.values()):
            return None
        alike = self._hidden and min(Counter(ranks.values()).values()) < LEAST_SUMMANDS
        of = dict(sorted(ranks.items()))
        return RankTerms(rule=rule, of=of, others=min(of.values()), alike=alike)

    def caution(self, terms: RankTerms | None) -> str:
        """Return a sentence on what of the adapter some or all clinics do not train; "" if none."""
        unable = sorted(name for name, most in self._largest.items() if most < self._rank)
        if self._rule == "same" and unable:
            return (
                f"{', '.join(unable)} train no rank as high as adapter.rank = {self._rank} and "
                "will refuse, as under this strategy all train the same; lower adapter.rank, or "
                "use a strategy for different ranks (fedpeft strategies)"
            )
        if terms is None:
            return ""
        if lowered := self._lowered(terms):
            return (
                f"fewer columns of the adapter are trained at {', '.join(lowered)} than could be, "
                "as too few clinics have so high a rank for a sum to hide them"
            )
        if (most := max(terms.of.values())) < self._rank:
            return (
                f"columns of the adapter beyond {most} are trained by nobody, as no clinic has a "
                f"higher rank; adapter.rank = {most} would do"
            )
        return ""

    def _lowered(self, terms: RankTerms) -> list[str]:
        """Return the clinics that train less than they could, so that a sum hides them."""
        able = {name: min(self._rank, most) for name, most in self._largest.items()}
        return [name for name, rank in terms.of.items() if rank < able.get(name, 0)]


def _shared(able: Mapping[str, int]) -> dict[str, int]:
    """Return the highest ranks at which each clinic has enough others beside it."""
    levels, ranks = sorted(set(able.values())), dict(able)
    for above, below in reversed(list(zip(levels[1:], levels, strict=False))):
        high = [name for name, rank in ranks.items() if rank >= above]
        if len(high) < LEAST_SUMMANDS:
            ranks |= dict.fromkeys(high, below)
    return ranks
