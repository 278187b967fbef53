"""What the people at a clinic decide: the content of ``client.toml``."""

import json
from pathlib import Path
from typing import Literal

from pydantic import Field

from fedpeft.config import LARGEST_DELTA, Adversary, ComputeDtype, KeySettings, Name, Settings


class DataSettings(Settings):
    """The clinic's records. They are read here and go nowhere."""

    train: Path
    valid: Path | None = None
    format: str | None = None
    """Record layout; None: detected from the file."""
    skip_bad_rows: bool = False


class BoxModelSettings(Settings):
    """The base model on this box."""

    directory: Path
    fingerprint: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    """The base model that this box agreed to train on; None: whatever the server names."""
    dtype: ComputeDtype = "auto"


class ServerSettings(Settings):
    """The central site, as the invitation named it."""

    address: str = Field(pattern=r"^\S+:\d{1,5}$")
    federation: Name


class LimitSettings(Settings):
    """The most that this box does for one message, whatever the server asks for."""

    threads: int | None = Field(default=None, ge=1)
    """CPU threads; None: all cores."""
    max_rank: int = Field(default=64, ge=1)
    max_steps: int = Field(default=10_000, ge=1)
    """Optimiser steps a round."""
    max_message_mb: int = Field(default=1024, ge=1)
    """MiB of one message from the server."""
    min_free_disk_mb: int = Field(default=1024, ge=0)


class ConfidentialitySettings(Settings):
    """What this box demands before an update leaves it."""

    require_secagg: bool = True
    """Refuse jobs in which the server would open this clinic's update by itself."""
    adversary: Adversary = "active"
    """The server that the threshold must protect against."""
    new_peers: Literal["accept", "refuse"] = "accept"
    """Whether a clinic that this box has never seen may be in a sum with it."""


class BudgetSettings(Settings):
    """How much privacy loss this clinic allows in all, whatever the server asks for."""

    max_epsilon: float | None = Field(default=None, gt=0)
    """Over all rounds, jobs and models on the same data; None: no bound, only a record of it."""
    unit: Literal["record", "patient"] = "record"
    """The least that a job must protect: ``patient`` refuses jobs that protect records only."""
    delta: float | None = Field(default=None, gt=0, le=LARGEST_DELTA)
    """None: 1e-5, or less above 50,000 units."""
    colluding_clinics: int = Field(default=1, ge=0)
    """Clinics that may work with the server: their shares of distributed noise do not count."""
    trust_central_noise: bool = False
    """Count on noise that the server promises to add; else it counts as none."""
    exact_losses: bool = False
    """Allow jobs with noise that ask for exact losses beside it."""
    ledger: Path = Path("../fedpeft-ledger.sqlite")
    """Where every step is charged; outside of the box's folder, so that it outlives joining anew.

    One file may serve all boxes of a machine."""


class ClientSettings(Settings):
    """The whole of ``client.toml``; relative paths count from its folder."""

    clinic: Name
    server: ServerSettings
    model: BoxModelSettings
    data: DataSettings
    limits: LimitSettings = LimitSettings()
    aggregation: ConfidentialitySettings = ConfidentialitySettings()
    privacy: BudgetSettings = BudgetSettings()
    keys: KeySettings = KeySettings()


def settings_toml(settings: ClientSettings) -> str:
    """Return ``client.toml`` with a word on each setting for the person who will edit it."""
    data, limits, aggregation = settings.data, settings.limits, settings.aggregation
    key_file, privacy = settings.keys.key_file, settings.privacy

    def optional(key: str, value: object, example: str) -> str:
        return f"{key} = {_toml(value)}" if value is not None else f"# {key} = {example}"

    return f"""# This box, as its people want it. Relative paths count from this folder.
clinic = {_toml(settings.clinic)}

[server]                      # from the invitation
address = {_toml(settings.server.address)}
federation = {_toml(settings.server.federation)}

[model]                       # the base model; it must be the federation's
directory = {_toml(str(settings.model.directory))}
{optional("fingerprint", settings.model.fingerprint, '"..."')}
dtype = {_toml(settings.model.dtype)}                # "auto", "float32" or "bfloat16"

[data]                        # read here, never sent
train = {_toml(str(data.train))}
{optional("valid", data.valid and str(data.valid), '"valid.jsonl"')}
{optional("format", data.format, '"question-answer"   # found out from the file if not set')}
skip_bad_rows = {_toml(data.skip_bad_rows)}

[limits]                      # the most this box does, whatever the server asks for
{optional("threads", limits.threads, "2                # CPU threads; all if not set")}
max_rank = {limits.max_rank}
max_steps = {limits.max_steps}             # optimiser steps in a round
max_message_mb = {limits.max_message_mb}
min_free_disk_mb = {limits.min_free_disk_mb}

[aggregation]                 # what this box demands before an update leaves it
require_secagg = {_toml(aggregation.require_secagg)}         # the server may learn sums only
adversary = {_toml(aggregation.adversary)}          # "curious": trust the server to keep the rules
new_peers = {_toml(aggregation.new_peers)}          # "refuse": only with clinics seen before

[privacy]                     # what training may give away of a person (docs/privacy.md)
{optional("max_epsilon", privacy.max_epsilon, "8.0          # refuse every round beyond it")}
unit = {_toml(privacy.unit)}                 # "patient": refuse jobs that protect records only
{optional("delta", privacy.delta, "1e-5")}
colluding_clinics = {privacy.colluding_clinics}         # others that may work with the server
trust_central_noise = {_toml(privacy.trust_central_noise)}   # noise that the server says it adds
exact_losses = {_toml(privacy.exact_losses)}          # report losses, which no noise protects
ledger = {_toml(str(privacy.ledger))}   # keep it: it knows what was spent

[keys]                        # how identity.key lies on the disk
passphrase = {_toml(settings.keys.passphrase)}            # asked for at every start
{optional("key_file", key_file and str(key_file), '"/media/usb/fedpeft.key"')}
"""


def _toml(value: object) -> str:
    # For the strings, numbers and booleans used here JSON is TOML.
    return json.dumps(value)
