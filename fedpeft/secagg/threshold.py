"""How many clinics must stay to the end for a sum to be safe to open (Bonawitz et al. 2017, 6.1).

Any two groups of t clinics that could vouch for different lists of survivors
share 2t - n of them. Against a server that may lie to each clinic, these must be
more than those it controls: t > 2n/3 withstands up to a third of the clinics.
Against one that keeps to the protocol t > n/2 is enough.
"""

from typing import Final

from fedpeft.config import LEAST_SUMMANDS, Adversary
from fedpeft.counts import counted
from fedpeft.errors import TooFewClinics, WeakThreshold

MOST_CLINICS: Final = 1000


def floor_of(clinics: int, adversary: Adversary) -> int:
    """Return the least threshold that withstands ``adversary`` among so many clinics."""
    floor = 2 * clinics // 3 + 1 if adversary == "active" else clinics // 2 + 1
    return max(floor, LEAST_SUMMANDS)


def threshold_of(clinics: int, adversary: Adversary, asked: int | None) -> int:
    """Return the threshold of a round: the floor, or what was asked for if that is more.

    Raises:
        TooFewClinics: it is more than there are clinics.
    """
    floor = floor_of(clinics, adversary)
    threshold = max(floor, asked or 0)
    if floor > clinics:
        raise TooFewClinics(
            f"{counted(clinics, 'clinic')} answered where a secure sum needs at least {floor}: "
            "mend what the others gave as reasons, if they were asked, or have more connected"
        )
    if threshold > clinics:
        raise TooFewClinics(
            f"{clinics} clinics answered where {threshold} were asked to stay to the end: mend "
            "what the others gave as reasons, have more connected, or ask for no more than "
            f"{clinics} in aggregation.threshold (with distributed noise in privacy.honest_clinics "
            f"too); what is below {floor} has no effect"
        )
    return threshold


def require_safe(threshold: int, clinics: int, adversary: Adversary) -> None:
    """Check, on the clinic's side, what the server says the threshold is.

    Raises:
        WeakThreshold: it protects less than this clinic demands.
        TooFewClinics: it cannot be reached.
    """
    floor = floor_of(clinics, adversary)
    if threshold < floor:
        raise WeakThreshold(
            f"the server's threshold of {threshold} among {clinics} clinics is below the {floor} "
            f"that this clinic demands (aggregation.adversary = {adversary!r} in client.toml), so "
            "nothing leaves it; the central site must set the same adversary"
        )
    if threshold > clinics:
        raise TooFewClinics(
            f"the server asks for a threshold of {threshold} and lists "
            f"{counted(clinics, 'clinic')}, so its sum can never be opened and nothing leaves this "
            "box: the central site must wait for more clinics, or lower aggregation.threshold"
        )
