"""What a federation is: the content of ``federation.toml``.

Frozen models with units in the names; no I/O here (see ``loading.py``).
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from fedpeft.config.privacy import PrivacySettings
from fedpeft.config.release import ReleaseSettings
from fedpeft.config.settings import Settings

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
Name = Annotated[str, Field(pattern=NAME_PATTERN)]
"""A name of a federation or clinic: safe in file names, certificates and logs."""

Quantization = Literal["none", "nf4"]
ComputeDtype = Literal["auto", "float32", "bfloat16"]
Confidentiality = Literal["secagg", "sealed"]
Adversary = Literal["active", "curious"]
LEAST_SUMMANDS = 3
"""Of a sum of two, each of the two could subtract itself and see the other."""


class ModelSettings(Settings):
    """The frozen base model that everybody fine-tunes."""

    base: str = "embedded"
    """A local directory, ``embedded`` (the demo model), or a hub id where a hub is allowed."""
    fingerprint: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    """SHA-256 over the weight files; None: whatever the directory at the server holds."""
    quantization: Quantization = "none"
    dtype: ComputeDtype = "auto"
    """Compute dtype of a simulation; a clinic box has its own setting."""


class AdapterSettings(Settings):
    """The LoRA adapter (Hu et al. 2021, arXiv:2106.09685)."""

    rank: int = Field(default=8, ge=1, le=16384)
    alpha: float = Field(default=16.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"


class TrainingSettings(Settings):
    """One clinic's work in one round."""

    optimizer: Literal["adamw", "adamw-8bit-paged", "sgd"] = "adamw"
    learning_rate: float = Field(default=2e-4, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    clip_norm: float = Field(default=1.0, gt=0)
    batch_size: int = Field(default=8, ge=1)
    """Rows in one optimiser step."""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Rows in memory at once; None: the whole batch. Smaller means gradient accumulation."""
    local_steps: int | None = Field(default=None, ge=1)
    """Optimiser steps a round; None: ``local_epochs`` counts instead."""
    local_epochs: int | None = Field(default=None, ge=1)
    """Passes over the clinic's rows a round; None with no ``local_steps``: one pass."""
    max_length: int = Field(default=512, ge=8)
    """Tokens; longer rows are cut, and counted."""
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear warm-up at the start of the whole run; the schedule spans all rounds."""
    bucket_by_length: bool = True
    gradient_checkpointing: bool = False
    proximal_mu: float = Field(default=0.0, ge=0)
    """FedProx term mu/2 * |w - w_global|^2 (Li et al. 2020, arXiv:1812.06127)."""
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _one_measure_of_work(self) -> "TrainingSettings":
        if self.local_steps is not None and self.local_epochs is not None:
            raise ValueError("local_steps and local_epochs exclude each other; keep one")
        if self.micro_batch_size is not None and self.micro_batch_size > self.batch_size:
            raise ValueError("micro_batch_size is larger than batch_size; make it smaller")
        return self


class RoundSettings(Settings):
    """How many rounds, and when a round counts."""

    count: int = Field(default=5, ge=1)
    minimum_clinics: int = Field(default=LEAST_SUMMANDS, ge=1)
    """A round with fewer answers is repeated, and after ``retries`` the run ends."""
    timeout_s: float = Field(default=3600.0, gt=0)
    """Seconds that a clinic has to answer one message of a round."""
    stick_timeout_s: float = Field(default=1209600.0, gt=0)
    """The same for a clinic without a network, for each trip of its stick: 14 days."""
    wait_s: float = Field(default=3600.0, ge=0)
    """Seconds to wait for the minimum of clinics to be connected before a round."""
    gather_s: float = Field(default=10.0, ge=0)
    """Of these, seconds to wait for the enrolled clinics beyond the minimum."""
    retries: int = Field(default=2, ge=0)
    patience: int | None = Field(default=None, ge=1)
    """Stop after so many rounds without a better validation loss; None: never."""
    ask_verdicts: bool = False
    """Ask how many clinics take a round's adapter into use; each must allow it to be counted."""


class AggregationSettings(Settings):
    """What the server may learn of the updates that it adds up."""

    confidentiality: Confidentiality = "secagg"
    """``secagg``: their sum only. ``sealed``: it opens each; clinics must allow that."""
    adversary: Adversary = "active"
    """The server to withstand; ``curious``: one that keeps to the protocol."""
    threshold: int | None = Field(default=None, ge=LEAST_SUMMANDS)
    """Clinics that must stay to the end; None, or too few: what ``adversary`` needs."""
    bits: int = Field(default=16, ge=8, le=24)
    """Bits of one quantised coordinate of one clinic."""
    limit: float | None = Field(default=None, gt=0)
    """Largest weighted coordinate (rows x change) of a clinic; None: found from round to round."""
    stage_timeout_s: float = Field(default=600.0, gt=0)
    """Seconds that a clinic has for each step after training."""


class StrategySettings(Settings):
    """How updates become the next adapter; ``fedpeft strategies`` lists the names."""

    name: str = "alternating"
    inner: str | None = None
    """What ``fedprox`` and the server optimisers are laid around; None: ``fedavg``."""
    reorthonormalize: bool = False
    """``ffa``: give A anew each round from the SVD of BA (FedSVD, arXiv:2505.12805)."""
    byzantine: int = Field(default=1, ge=1)
    """``trimmed-mean`` and ``multi-krum``: how many clinics may send anything."""
    max_norm: float | None = Field(default=None, gt=0)
    """``norm-bound``: the longest change that is not shortened; None: the round's median."""
    server_learning_rate: float | None = Field(default=None, gt=0)
    """Of a server optimiser; None: 1 - beta_1 for ``fedavgm``, 0.01 for the adaptive ones."""
    beta_1: float = Field(default=0.9, ge=0, lt=1)
    """A server optimiser's momentum."""
    beta_2: float = Field(default=0.99, ge=0, lt=1)
    """Decay of the second moment of ``fedadam`` and ``fedyogi``."""
    tau: float = Field(default=1e-3, gt=0)
    """Adaptivity of ``fedadam``, ``fedyogi`` and ``fedadagrad`` (Reddi et al. 2021)."""


class ClinicSettings(Settings):
    """One simulated clinic: its name and its files."""

    name: Name
    train: Path
    valid: Path | None = None
    format: str | None = None
    """Record layout; None: detected from the file."""
    skip_bad_rows: bool = False
    max_rank: int | None = Field(default=None, ge=1)
    """The largest rank that it trains; None: any."""


class FederationSettings(Settings):
    """The whole of ``federation.toml``."""

    name: Name = "federation"
    model: ModelSettings = ModelSettings()
    adapter: AdapterSettings = AdapterSettings()
    training: TrainingSettings = TrainingSettings()
    rounds: RoundSettings = RoundSettings()
    strategy: StrategySettings = StrategySettings()
    aggregation: AggregationSettings = AggregationSettings()
    privacy: PrivacySettings | None = None
    release: ReleaseSettings = ReleaseSettings()
    clinic: tuple[ClinicSettings, ...] = ()

    @model_validator(mode="after")
    def _sums_hide_their_parts(self) -> "FederationSettings":
        minimum = self.rounds.minimum_clinics
        if self.aggregation.confidentiality == "secagg" and minimum < LEAST_SUMMANDS:
            raise ValueError(
                f"rounds.minimum_clinics = {minimum} is too few for secure aggregation, as a sum "
                f"of fewer than {LEAST_SUMMANDS} shows single updates; raise it, or set "
                'aggregation.confidentiality = "sealed" here and require_secagg = false on each box'
            )
        return self

    @model_validator(mode="after")
    def _distributed_noise_adds_up(self) -> "FederationSettings":
        if self.privacy is None or self.privacy.mechanism != "distributed":
            return self
        needed = {
            'aggregation.confidentiality = "secagg"': self.aggregation.confidentiality == "secagg",
            "training.local_steps = 1": self.training.local_steps == 1,
            'training.optimizer = "sgd"': self.training.optimizer == "sgd",
            "a number as privacy.noise_multiplier": self.privacy.noise_multiplier != "auto",
        }
        if missing := [text for text, there in needed.items() if not there]:
            raise ValueError(
                f'privacy.mechanism = "distributed" needs {" and ".join(missing)}: only the sum '
                "over the clinics carries the whole noise, and only of a single step"
            )
        return self

    @model_validator(mode="after")
    def _clinics_are_distinct(self) -> "FederationSettings":
        names = [clinic.name for clinic in self.clinic]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two [[clinic]] entries are named {name!r}; rename one")
        return self
