"""Secure aggregation: the server learns the sum of the clinics' vectors and nothing else."""

from fedpeft.secagg.clinic_side import (
    STAGES,
    AdmitPeers,
    AgreeToSum,
    ClinicSession,
    Contribution,
    State,
)
from fedpeft.secagg.masked_vector import CLIPPED, masked_vector
from fedpeft.secagg.quantise import Quantiser
from fedpeft.secagg.server_side import Aggregation, SecureSum, Terms
from fedpeft.secagg.session import Session
from fedpeft.secagg.vector import Layout

__all__ = [
    "CLIPPED",
    "STAGES",
    "AdmitPeers",
    "Aggregation",
    "AgreeToSum",
    "ClinicSession",
    "Contribution",
    "Layout",
    "Quantiser",
    "SecureSum",
    "Session",
    "State",
    "Terms",
    "masked_vector",
]
