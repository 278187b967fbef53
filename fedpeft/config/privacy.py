"""Differential privacy, as the central site asks for it: the ``[privacy]`` table."""

from typing import Literal

from pydantic import Field, model_validator

from fedpeft.config.settings import Settings

PrivacyUnit = Literal["record", "patient", "clinic"]
PrivacyMechanism = Literal["local", "distributed", "central"]
LARGEST_DELTA = 1e-5


class PrivacySettings(Settings):
    """Who is protected, by which noise, and how strongly (Dwork and Roth 2014)."""

    unit: PrivacyUnit
    """What may be added or removed without a visible effect: a record, all records of a
    patient, or all of a clinic."""
    mechanism: PrivacyMechanism = "local"
    """``local``: each clinic adds all of the noise to its own steps. ``distributed``: each
    adds a share, under secure aggregation. ``central``: the server adds it (clinics only)."""
    epsilon: float | None = Field(default=None, gt=0)
    """The bound for the whole run, at which ``noise_multiplier = "auto"`` aims."""
    delta: float | None = Field(default=None, gt=0, le=LARGEST_DELTA)
    """None: 1e-5, or less where a clinic has more than 50,000 units."""
    clip: float = Field(default=1.0, ge=1e-9, le=1e9)
    """L2 norm to which the gradient of a unit (the update of a clinic) is cut."""
    noise_multiplier: float | Literal["auto"] = "auto"
    """Standard deviation of the noise over ``clip``."""
    records_per_patient: int = Field(default=16, ge=1)
    """Most records of one patient in a step; of more, some are drawn anew in each step."""
    honest_clinics: int | None = Field(default=None, ge=1)
    """``distributed``: the clinics whose shares make up the whole noise; a sum of fewer is
    not opened. None: ``rounds.minimum_clinics``."""
    target_quantile: float = Field(default=0.5, gt=0, lt=1)
    """``central``: the share of clinics that the adaptive clip should leave uncut."""
    exact_losses: bool = False
    """Clinics report exact losses, which no noise protects; each clinic must allow it."""
    test_seed: int | None = Field(default=None, ge=0)
    """Simulations only: noise and samples that repeat. Such a run is not private."""

    @model_validator(mode="after")
    def _parts_fit(self) -> "PrivacySettings":
        if (self.unit == "clinic") != (self.mechanism == "central"):
            raise ValueError(
                f'unit = "{self.unit}" cannot be protected by mechanism = "{self.mechanism}": use '
                '"central" for clinics, "local" or "distributed" for records and patients'
            )
        if self.noise_multiplier == "auto" and self.epsilon is None:
            raise ValueError('noise_multiplier = "auto" needs an epsilon to aim at; set epsilon')
        if self.noise_multiplier != "auto" and self.noise_multiplier <= 0:
            raise ValueError("noise_multiplier must be above 0; without noise leave [privacy] out")
        if self.noise_multiplier != "auto" and not 1e-9 <= self.noise_multiplier <= 1e4:
            raise ValueError("noise_multiplier must be 1e-9 to 10,000; about 1 is usual")
        return self
