"""What a clinic tells the server of its privacy loss: numbers that depend on no record."""

from typing import Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedpeft.errors import AdapterError

PRIVACY: Final = "privacy"
"""Field of a training answer: a :class:`ClinicPrivacy` as JSON."""


class ClinicPrivacy(BaseModel):
    """A clinic's loss over all rounds of this federation on its data.

    ``epsilon`` is the guarantee at ``delta`` and ``epsilon_rdp`` the same by Rényi
    accounting; None: there is no bound. Distributed noise has two more views:
    ``epsilon_outside`` against everyone who sees the sums only, with no clinic working
    with the server, and ``epsilon_alone`` with this clinic's own share of the noise only.
    They depend on the number of units, the batch and the noise, and on no record.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    epsilon: float | None = Field(ge=0)
    delta: float = Field(gt=0, lt=1)
    epsilon_rdp: float | None = Field(ge=0)
    steps: int = Field(ge=0)
    noise_multiplier: float = Field(ge=0)
    clip: float = Field(gt=0)
    epsilon_outside: float | None = Field(default=None, ge=0)
    epsilon_alone: float | None = Field(default=None, ge=0)


def clinic_privacy(text: str, *, source: str) -> ClinicPrivacy:
    """Read what a clinic reports.

    Raises:
        AdapterError: it is not in this form.
    """
    try:
        return ClinicPrivacy.model_validate_json(text)
    except ValidationError:
        raise AdapterError(
            f"{source} reports no usable privacy loss; its answer is not used"
        ) from None
