"""What a run knows of the privacy that its clinics lost, for its files and its watchers."""

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from fedpeft.config import FederationSettings, PrivacySettings
from fedpeft.protocol.privacy import ClinicPrivacy


class PrivacyRecord(BaseModel):
    """One round: each clinic's loss up to it, and the clip norms where the server adds noise.

    ``noise_to_signal`` is the norm of the central noise over that of the largest possible
    mean; above 1 the noise is what the adapter learns.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    clinics: dict[str, ClinicPrivacy]
    clip: float | None = None
    next_clip: float | None = None
    noise_to_signal: float | None = None


def latest_losses(records: Sequence[PrivacyRecord | None]) -> dict[str, ClinicPrivacy]:
    """Return each clinic's last report."""
    losses: dict[str, ClinicPrivacy] = {}
    for record in records:
        losses |= record.clinics if record is not None else {}
    return dict(sorted(losses.items()))


def summary_of(
    settings: FederationSettings, records: Sequence[PrivacyRecord | None]
) -> dict[str, Any] | None:
    """Return the ``privacy`` entry of a run's summary; None for a run without noise."""
    privacy = settings.privacy
    if privacy is None:
        return None
    losses = latest_losses(records)
    bounded = all(loss.epsilon is not None for loss in losses.values())
    views = {"epsilon_outside", "epsilon_alone"}
    others: set[str] = set() if privacy.mechanism == "distributed" else views
    return {
        "unit": privacy.unit,
        "mechanism": privacy.mechanism,
        "epsilon_goal": privacy.epsilon,
        "private": privacy.test_seed is None and bounded,
        "clinics": {name: loss.model_dump(exclude=others) for name, loss in losses.items()},
        "assumptions": assumptions(settings, privacy),
    }


def beyond_goal(settings: FederationSettings, records: Sequence[PrivacyRecord | None]) -> str:
    """Return a sentence on the clinics that lost more than the run aimed at; "" if none did."""
    goal = settings.privacy.epsilon if settings.privacy is not None else None
    if goal is None:
        return ""
    spent = {name: loss.epsilon for name, loss in latest_losses(records).items()}
    beyond = [name for name, epsilon in spent.items() if epsilon is not None and epsilon > goal]
    if not beyond:
        return ""
    return (
        f"{', '.join(beyond)} lost more than privacy.epsilon = {goal:g}, as rounds were repeated "
        "or runs before this one used the same records; it is their figure that holds"
    )


def assumptions(settings: FederationSettings, privacy: PrivacySettings) -> list[str]:
    """Return what the figures rest on, a sentence each, for the person who signs them off."""
    unit = privacy.unit
    found = [
        f"neighbouring data sets differ by one {unit}, added or removed (a clinic's update "
        "taken as zero, and as neither within the clip nor beyond it, where the unit is a clinic)",
        "the number of units and rows of a clinic, its batch size, who takes part and when are "
        "not protected",
        "epsilon counts every release of this run in which the clinic was, and no other run"
        if privacy.mechanism == "central"
        else "epsilon counts every training step of this federation on the clinic's data, repeated "
        "rounds and earlier runs included, up to its last report; the clinic's own ledger is what "
        "counts",
    ]
    if unit == "record":
        found.append("a patient with several records is protected by less than a single record")
    if privacy.mechanism != "central" and privacy.test_seed is None:
        found.append("units are sampled and noise is drawn on each clinic's box, unseen by others")
    if privacy.mechanism == "distributed":
        honest = privacy.honest_clinics or settings.rounds.minimum_clinics
        found += [
            f"at least {honest} clinics are in each sum and add their share of the noise as told; "
            "a clinic reveals nothing of a sum of fewer",
            "epsilon is against a server that works with as many of them as the clinic's "
            "colluding_clinics says; epsilon_outside is against everyone else, epsilon_alone "
            "what the clinic's own share gives by itself",
        ]
    if privacy.mechanism == "central":
        found.append("the server adds the noise and is trusted to; it is not itself kept out")
    if privacy.exact_losses:
        found.append("training and validation losses are exact and not covered by the guarantee")
    if privacy.test_seed is not None:
        found.append("NOT PRIVATE: samples and noise came from a known seed (privacy.test_seed)")
    return found
