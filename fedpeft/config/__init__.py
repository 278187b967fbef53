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
    Settings,
    StrategySettings,
    TrainingSettings,
)
from fedpeft.config.keys import KeySettings
from fedpeft.config.loading import load_settings, parse_settings, read_toml

__all__ = [
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
    "Quantization",
    "RoundSettings",
    "Settings",
    "StrategySettings",
    "TrainingSettings",
    "load_settings",
    "parse_settings",
    "read_toml",
]
