"""What this clinic lets a server order: the rules that can be judged from a job alone.

Each rule has an error class of its own, whose sentence stays on the box and whose reason
is all that the server is told. Rules that need more than the job are held where that is
known: memory in ``memory.py``, traffic in ``traffic.py``, privacy in ``cost.py`` and the
ledger, steps and ranks in ``work.py``. Nothing that a server sends can change a rule.
"""

import datetime
import shutil
from collections.abc import Callable

from fedpeft.errors import (
    BaseNotAllowed,
    DiskLimit,
    MethodNotAllowed,
    OutsideHours,
    SecAggRequired,
    SignerNotAllowed,
)
from fedpeft.protocol import TRAIN, Job
from fedpeft.training import Observer, StepDone
from fedpeft_client.limits.working_hours import is_open, next_opening
from fedpeft_client.rounds.clinic import Clinic
from fedpeft_client.settings import Method

Now = Callable[[], datetime.datetime]
"""The present local time."""


def require_allowed(clinic: Clinic, job: Job, kind: str, now: datetime.datetime) -> None:
    """Check ``job``, which opened as the server's ``train`` or ``evaluate``, before it is begun.

    ``now`` is local time. Measuring is allowed at every hour, as a round's result is
    received with it.

    Raises:
        SignerNotAllowed, SecAggRequired, BaseNotAllowed, MethodNotAllowed, OutsideHours,
        DiskLimit: the rule that forbids it.
    """
    require_signer(clinic)
    _require_secagg(clinic, job)
    _require_base(clinic, job)
    _require_methods(clinic, job)
    if kind == TRAIN:
        require_hours(clinic, now)
    require_disk(clinic)


def require_signer(clinic: Clinic) -> None:
    """Check that the pinned server is one whose orders this clinic takes.

    Raises:
        SignerNotAllowed: it is not.
    """
    signers, server = clinic.policy.signers, clinic.membership.server.fingerprint
    if signers is not None and server not in signers:
        raise SignerNotAllowed(
            f"the order comes from the server identity {server}, which policy.signers in "
            "client.toml does not list: nothing was done; compare the fingerprint with the "
            "central site by telephone before you add it"
        )


def require_hours(
    clinic: Clinic, now: datetime.datetime, *, outcome: str = "nothing was trained"
) -> None:
    """Check that training may run at the local time ``now``; ``outcome`` ends the sentence.

    Raises:
        OutsideHours: it may not.
    """
    hours = clinic.policy.hours
    if hours is not None and not is_open(hours, now):
        raise OutsideHours(
            f"it is {now:%a %H:%M} and policy.hours = {list(hours)} in client.toml allows training "
            f"again from {next_opening(hours, now):%a %H:%M}: {outcome}"
        )


def require_disk(clinic: Clinic) -> None:
    """Check that enough of the disks is free on which this box writes.

    Raises:
        DiskLimit: it is not.
    """
    limit = clinic.limits.min_free_disk_mb
    kept = clinic.adapter_directory or clinic.personal_directory
    for directory in {clinic.ledger.parent, *(() if kept is None else (kept.parent,))}:
        # What is not made yet comes to lie on the disk of the folder above it.
        existing = next(each for each in (directory, *directory.parents) if each.exists())
        free = shutil.disk_usage(existing).free >> 20
        if free < limit:
            raise DiskLimit(
                f"{free} MiB are free in {existing} where limits.min_free_disk_mb = {limit} in "
                "client.toml: nothing was done; free some space or lower that limit"
            )


def within_hours(observe: Observer | None, clinic: Clinic, now: Now) -> Observer:
    """Return an observer that ends a training when its hours end before its last step.

    A round that is over is not thrown away for the minute that sending it takes.

    Raises:
        OutsideHours: by the observer; what was trained is dropped.
    """

    def watch(done: StepDone) -> None:
        if observe is not None:
            observe(done)
        if done.step < done.steps:
            require_hours(clinic, now(), outcome="training was stopped and its steps are dropped")

    return watch


def _require_secagg(clinic: Clinic, job: Job) -> None:
    if job.aggregation.confidentiality == "sealed" and clinic.aggregation.require_secagg:
        raise SecAggRequired(
            "the server wants to open this clinic's update by itself, and require_secagg = "
            "true in client.toml forbids it: nothing was trained; set it to false only if this "
            "clinic agrees, or ask the central site for secure aggregation"
        )


def _require_base(clinic: Clinic, job: Job) -> None:
    allowed = clinic.policy.base_models
    if allowed is not None and job.fingerprint not in allowed:
        raise BaseNotAllowed(
            f"the job is for a base model with fingerprint {job.fingerprint[:12]}, and client.toml "
            f"allows {', '.join(each[:12] for each in allowed)} only (policy.base_models, or "
            "model.fingerprint): nothing was done; add it there if this clinic agrees"
        )


def _require_methods(clinic: Clinic, job: Job) -> None:
    allowed = clinic.policy.methods
    if allowed is None:
        return
    if forbidden := [method for method in methods_of(job) if method not in allowed]:
        raise MethodNotAllowed(
            f"the job needs the method {' and '.join(forbidden)}, and policy.methods = "
            f"{list(allowed)} in client.toml does not name it: nothing was done; add it if this "
            "clinic agrees, or ask the central site for another strategy"
        )


def methods_of(job: Job) -> list[Method]:
    """Return what ``job`` does, in the words of ``policy.methods``."""
    found: list[Method] = ["lora"]
    if job.trains != job.sends:
        found.append("personal")
    if job.base_change:
        found.append("base-change")
    return found
