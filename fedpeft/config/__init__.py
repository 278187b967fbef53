"""Configuration: what may be set, and how it is read."""

from fedpeft.config.federation import (
    LEAST_SUMMANDS,
    NAME_PATTERN,
    AdapterSettings,
    Adversary,
    AggregationSettings,
    ClinicSettings,
    ComputeDtype,
    Confidentiality,
    FederationSettings,
    ModelSettings,
    Name,
    Quantization,
    RoundSettings,
    StrategySettings,
    TrainingSettings,
)
from fedpeft.config.keys import KeySettings
from fedpeft.config.loading import load_settings, parse_settings, read_toml
from fedpeft.config.privacy import (
    LARGEST_DELTA,
    PrivacyMechanism,
    PrivacySettings,
    PrivacyUnit,
)
from fedpeft.config.release import ReleaseSettings
from fedpeft.config.settings import Settings

__all__ = [
    "LARGEST_DELTA",
    "LEAST_SUMMANDS",
    "NAME_PATTERN",
    "AdapterSettings",
    "Adversary",
    "AggregationSettings",
    "ClinicSettings",
    "ComputeDtype",
    "Confidentiality",
    "FederationSettings",
    "KeySettings",
    "ModelSettings",
    "Name",
    "PrivacyMechanism",
    "PrivacySettings",
    "PrivacyUnit",
    "Quantization",
    "ReleaseSettings",
    "RoundSettings",
    "Settings",
    "StrategySettings",
    "TrainingSettings",
    "load_settings",
    "parse_settings",
    "read_toml",
]
