"""Configuration: what may be set, and how it is read."""

from fedpeft.config.federation import (
    NAME_PATTERN,
    AdapterSettings,
    ClinicSettings,
    ComputeDtype,
    FederationSettings,
    ModelSettings,
    Name,
    Quantization,
    RoundSettings,
    Settings,
    StrategySettings,
    TrainingSettings,
)
from fedpeft.config.loading import load_settings, parse_settings, read_toml

__all__ = [
    "NAME_PATTERN",
    "AdapterSettings",
    "ClinicSettings",
    "ComputeDtype",
    "FederationSettings",
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
