"""What the people at a clinic decide: the content of ``client.toml``."""

import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from fedpeft.config import LARGEST_DELTA, Adversary, ComputeDtype, KeySettings, Name, Settings
from fedpeft_client.limits.working_hours import checked_window

CONFIG_FILE = "client.toml"
Carrier = Literal["network", "stick"]
Method = Literal["lora", "personal", "base-change"]
"""What a job does: train LoRA factors, keep some of them on the box, change the base model."""


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
    carrier: Carrier = "network"
    """How its messages come: ``stick``, in files that a person carries; nothing is connected."""


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
    max_memory_mb: int | None = Field(default=None, ge=1)
    """MiB of main memory of the whole client; None: all that the machine gives."""
    max_mb_per_day: int | None = Field(default=None, ge=1)
    """MiB sent and received from one midnight to the next, local time; None: no limit."""


class PolicySettings(Settings):
    """Who may order training here, of what, and when; None leaves a rule out."""

    signers: (
        Annotated[
            tuple[Annotated[str, Field(pattern=r"^[0-9a-f]{4}(-[0-9a-f]{4}){7}$")], ...],
            Field(min_length=1),
        ]
        | None
    ) = None
    """Fingerprints of the server identities that may order; None: the pinned one."""
    base_models: (
        Annotated[tuple[Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")], ...], Field(min_length=1)]
        | None
    ) = None
    """Fingerprints; None: ``model.fingerprint``, and without that any that lies here."""
    methods: Annotated[tuple[Method, ...], Field(min_length=1)] | None = None
    """What a job may do; None: all of it."""
    hours: (
        Annotated[tuple[Annotated[str, AfterValidator(checked_window)], ...], Field(min_length=1)]
        | None
    ) = None
    """Windows of local time in which training may run, such as ``mon-fri 19:00-06:00``."""


class CheckpointSettings(Settings):
    """How much of a round's work a kill or a power cut may cost."""

    every_s: float = Field(default=60.0, ge=0)
    """Seconds between two; more where writing them would take over 2 % of the time."""
    keep: int = Field(default=2, ge=1)
    max_mb: int = Field(default=1024, ge=0)
    """MiB of all of them; 0: none, a round that is stopped begins anew."""


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


class StoreSettings(Settings):
    """How many versions of the adapter this box keeps; those in use or pinned always stay."""

    max_versions: int = Field(default=20, ge=1)
    max_mb: int = Field(default=4096, ge=1)
    """MiB of all of them."""


class AcceptanceSettings(Settings):
    """When an adapter that arrives is taken into use here, instead of the one before."""

    min_improvement: float = Field(default=0.0, gt=-1, lt=1)
    """The least part by which its loss on this clinic's validation rows must be lower."""
    max_forgetting: float = Field(default=0.1, ge=0)
    """The most part by which its loss on general language may be above the base model's."""
    report_verdict: bool = False
    """Tell the server whether it was taken, if the federation asks (``rounds.ask_verdicts``)."""


class InferenceSettings(Settings):
    """How this box answers questions with its adapters; nothing of it leaves the machine."""

    engine: Literal["auto", "llama.cpp", "transformers"] = "auto"
    """``auto``: transformers in 4 bits on CUDA, llama.cpp on a CPU where it can run the base."""
    quantisation: Literal["f32", "f16", "q8_0", "q4_0", "q4_k_m"] = "q4_k_m"
    """How llama.cpp stores the base model."""
    context: int = Field(default=4096, ge=64)
    """Tokens of a prompt and its answer together; less if the base model reads fewer."""
    parallel: int = Field(default=4, ge=1, le=32)
    """Answers computed at a time."""
    waiting: int = Field(default=16, ge=0)
    """Requests of ``serve`` that may wait for a place; more are refused with 503."""
    max_tokens: int = Field(default=1024, ge=1)
    """Tokens of one answer of ``serve``, whatever a request asks for."""
    listen: str = Field(default="127.0.0.1:8484", pattern=r"^\S+:\d{1,5}$")
    """Where ``serve`` listens; beyond this machine itself it asks for a key."""


class ClientSettings(Settings):
    """The whole of ``client.toml``; relative paths count from its folder."""

    clinic: Name
    server: ServerSettings
    model: BoxModelSettings
    data: DataSettings
    limits: LimitSettings = LimitSettings()
    checkpoints: CheckpointSettings = CheckpointSettings()
    policy: PolicySettings = PolicySettings()
    aggregation: ConfidentialitySettings = ConfidentialitySettings()
    privacy: BudgetSettings = BudgetSettings()
    adapters: StoreSettings = StoreSettings()
    acceptance: AcceptanceSettings = AcceptanceSettings()
    inference: InferenceSettings = InferenceSettings()
    keys: KeySettings = KeySettings()


def settings_toml(settings: ClientSettings) -> str:
    """Return ``client.toml`` with a word on each setting for the person who will edit it."""
    data, limits, aggregation = settings.data, settings.limits, settings.aggregation
    policy, checkpoints = settings.policy, settings.checkpoints
    key_file, privacy = settings.keys.key_file, settings.privacy
    acceptance = settings.acceptance
    inference = settings.inference

    def optional(key: str, value: object, example: str) -> str:
        return f"{key} = {_toml(value)}" if value is not None else f"# {key} = {example}"

    return f"""# This box, as its people want it. Relative paths count from this folder.
clinic = {_toml(settings.clinic)}

[server]                      # from the invitation
address = {_toml(settings.server.address)}
federation = {_toml(settings.server.federation)}
carrier = {_toml(settings.server.carrier)}           # "stick": this box has no network

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
{optional("max_memory_mb", limits.max_memory_mb, "4096       # main memory; all if not set")}
{optional("max_mb_per_day", limits.max_mb_per_day, "2000      # sent and received; any if not set")}

[policy]                      # who may order training here, of what, and when
{optional("signers", policy.signers, '["..."]            # server identities; the pinned one')}
{optional("base_models", policy.base_models, '["..."]        # fingerprints; that of [model]')}
{optional("methods", policy.methods, '["lora"]           # also "personal", "base-change"; all')}
{optional("hours", policy.hours, '["mon-fri 19:00-06:00", "sat,sun 00:00-24:00"]   # any time')}

[checkpoints]                 # so that a power cut does not cost a round's work
every_s = {checkpoints.every_s}
keep = {checkpoints.keep}
max_mb = {checkpoints.max_mb}                 # of all of them; 0: none

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

[adapters]                    # the versions that this box keeps
max_versions = {settings.adapters.max_versions}
max_mb = {settings.adapters.max_mb}

[acceptance]                  # when a new one is used here (docs/administrator.md)
min_improvement = {acceptance.min_improvement}         # by what part its loss must be lower
max_forgetting = {acceptance.max_forgetting}          # by what part general language may get worse
report_verdict = {_toml(acceptance.report_verdict)}        # tell the server yes or no, if it asks

[inference]                   # answers on this box (docs/inference.md)
engine = {_toml(inference.engine)}               # "llama.cpp" or "transformers" to choose
quantisation = {_toml(inference.quantisation)}       # "f32", "f16", "q8_0", "q4_0" or "q4_k_m"
context = {inference.context}                # tokens of a prompt and its answer
parallel = {inference.parallel}                  # answers at a time
waiting = {inference.waiting}                  # requests that may wait for a place
max_tokens = {inference.max_tokens}             # of one answer of fedpeft-client serve
listen = {_toml(inference.listen)}   # where fedpeft-client serve listens

[keys]                        # how identity.key lies on the disk
passphrase = {_toml(settings.keys.passphrase)}            # asked for at every start
{optional("key_file", key_file and str(key_file), '"/media/usb/fedpeft.key"')}
"""


def _toml(value: object) -> str:
    # For the strings, numbers and booleans used here JSON is TOML.
    return json.dumps(value)
