"""Whether a new adapter is good enough to be used on this box: the rule, and nothing else.

Plain losses in, a verdict with its reason out; how they were measured, and where adapters
lie, is not known here. Whatever the verdict, training goes on with the server's adapter.
"""

import math
from typing import Final

from pydantic import BaseModel, ConfigDict

from fedpeft_client.settings import AcceptanceSettings

_GUESSING: Final = 0.95
"""From this part of the loss of guessing on, a base model tells next to nothing."""


class Losses(BaseModel):
    """Loss in nats per target token: on the clinic's validation rows, and on general language.

    ``own`` is None where the clinic has no validation rows.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")
    own: float | None
    general: float


class Verdict(BaseModel):
    """Whether an adapter was taken into use, why, and what that rests on.

    ``rival`` is the name of what was in use when it came, with its losses in ``in_use``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    accepted: bool
    reason: str
    rival: str
    new: Losses | None = None
    in_use: Losses | None = None
    base: Losses | None = None


def judge(
    settings: AcceptanceSettings,
    *,
    new: Losses,
    in_use: Losses,
    base: Losses,
    rival: str,
    vocabulary: int,
) -> Verdict:
    """Compare a new adapter with the one in use on the clinic's rows, and with the base elsewhere.

    Without validation rows of the clinic only the second half of the rule can be applied.
    A base model that does no better than guessing among the ``vocabulary`` tokens that it
    has changes no verdict, but the reason says so: adapters of it are hardly of use.
    """
    accepted, reason = _decision(settings, new, in_use, base, rival)
    reason += _doubt(base, vocabulary)
    return Verdict(accepted=accepted, reason=reason, rival=rival, new=new, in_use=in_use, base=base)


def _decision(
    settings: AcceptanceSettings, new: Losses, in_use: Losses, base: Losses, rival: str
) -> tuple[bool, str]:
    if not all(math.isfinite(loss) for loss in (new.general, new.own or 0.0)):
        return False, "its loss here is not a finite number"
    if not math.isfinite(base.general):
        return False, "there is nothing to compare with on general language"
    forgetting = _rise(base.general, new.general)
    if forgetting > settings.max_forgetting:
        return False, (
            f"it forgets general language: the loss there is {new.general:.4f}, "
            f"{100 * forgetting:.1f} % above the base model's {base.general:.4f}, and "
            f"acceptance.max_forgetting = {settings.max_forgetting:g} in client.toml"
        )
    if new.own is None or in_use.own is None:
        return True, (
            "unmeasured on records of this clinic, as there are none to measure with: set "
            "data.valid in client.toml"
        )
    improvement = -_rise(in_use.own, new.own)
    compared = (
        f"its loss on this clinic's validation rows is {new.own:.4f}, "
        f"{_change(improvement)} {in_use.own:.4f} of {rival}"
    )
    if improvement < settings.min_improvement:
        return False, (
            f"{compared}, and acceptance.min_improvement = {settings.min_improvement:g} in "
            "client.toml"
        )
    return True, compared


def _doubt(base: Losses, vocabulary: int) -> str:
    """Return what to add to a reason if the base model itself is of no use here."""
    check = "check that model.directory holds the federation's base model, undamaged"
    guessing = math.log(vocabulary)
    for loss, rows in ((base.own, "this clinic's validation rows"), (base.general, "general text")):
        if loss is None:
            continue
        if not math.isfinite(loss):
            return f"; the base model's own loss on {rows} is no finite number: {check}"
        if loss >= _GUESSING * guessing:
            return (
                f"; the base model itself does hardly better than guessing on {rows}, its loss is "
                f"{loss:.2f} and that of guessing among {vocabulary} tokens {guessing:.2f}: {check}"
            )
    return ""


def _rise(old: float, new: float) -> float:
    """Return by what part of ``old`` the loss ``new`` is higher."""
    if old == new:
        return 0.0
    return (
        (new - old) / old if math.isfinite(old) and old > 0 else math.copysign(math.inf, new - old)
    )


def _change(improvement: float) -> str:
    if improvement == 0:
        return "the same as the"
    side = "below" if improvement > 0 else "above"
    return f"{100 * abs(improvement):.2f} % {side} the"
