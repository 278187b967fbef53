"""How much main memory a job may take: judged before it begins, held while it runs.

While a job runs, the kernel refuses what this process would allocate beyond the limit
(``RLIMIT_DATA``, which Linux enforces), and the resident size, which also counts files
that are mapped, is looked at after each step. Must not know messages.
"""

import resource
from collections.abc import Generator
from contextlib import contextmanager

import psutil

from fedpeft.errors import FedpeftError, MemoryLimit
from fedpeft.models import adapter_schema
from fedpeft.models.source import weight_files
from fedpeft.protocol import TRAIN, Job
from fedpeft.training import Observer, StepDone
from fedpeft_client.rounds.clinic import Clinic

_MIB = 1 << 20
_OPTIMIZER_COPIES = {"adamw": 4, "adamw-8bit-paged": 2, "sgd": 2}
"""Weights, their gradient, and what the optimiser keeps of each in 32 bits."""


def least_bytes(clinic: Clinic, job: Job, kind: str) -> int:
    """Return the least that ``job`` takes: base model and adapter, without any activations.

    In 4 bits a base takes about a third of its 16-bit file; in 16 bits at least half of
    its file, which may be in 32.

    Raises:
        ModelError, AdapterError: the base model or the adapter cannot be used.
    """
    files = sum(path.stat().st_size for path in weight_files(clinic.model))
    base = files // 3 if job.quantization == "nf4" else files
    if job.quantization == "none" and clinic.dtype != "float32":
        base = files // 2
    copies = _OPTIMIZER_COPIES[job.training.optimizer] if kind == TRAIN else 1
    return base + 4 * copies * adapter_schema(clinic.model, job.adapter).numel


def require_memory(clinic: Clinic, job: Job, kind: str) -> None:
    """Check that the least that ``job`` takes is within the limit.

    Raises:
        MemoryLimit: it is not.
        ModelError, AdapterError: the base model or the adapter cannot be used.
    """
    limit = clinic.limits.max_memory_mb
    if limit is None:
        return
    needed = -(-least_bytes(clinic, job, kind) // _MIB)
    if needed > limit:
        raise MemoryLimit(
            f"the job needs at least {needed} MiB of memory where limits.max_memory_mb = {limit} "
            "in client.toml: nothing was done; raise the limit, or ask the central site for "
            'quantization = "nf4" or a smaller rank'
        )


@contextmanager
def bounded_memory(limit_mb: int | None) -> Generator[None]:
    """Let this process grow to ``limit_mb`` MiB in the body and no further.

    Raises:
        MemoryLimit: it is larger already, or the body asked for more.
    """
    if limit_mb is None:
        yield
        return
    require_resident(limit_mb)
    before, hard = resource.getrlimit(resource.RLIMIT_DATA)
    now = psutil.Process().memory_info()
    bound = now.data + limit_mb * _MIB - now.rss
    resource.setrlimit(resource.RLIMIT_DATA, (_least_limit(bound, before, hard), hard))
    try:
        yield
    except FedpeftError:
        raise
    except (MemoryError, RuntimeError) as error:
        # PyTorch reports what the system refuses as a plain RuntimeError.
        if isinstance(error, MemoryError) or "memory" in str(error).lower():
            raise _stopped(limit_mb) from error
        raise
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (before, hard))


def require_resident(limit_mb: int) -> None:
    """Check the resident size of this process.

    Raises:
        MemoryLimit: it is above ``limit_mb`` MiB.
    """
    if psutil.Process().memory_info().rss > limit_mb * _MIB:
        raise _stopped(limit_mb)


def within_memory(observe: Observer | None, limit_mb: int | None) -> Observer:
    """Return an observer that ends a training whose process has grown too large.

    Raises:
        MemoryLimit: by the observer.
    """

    def watch(done: StepDone) -> None:
        if observe is not None:
            observe(done)
        if limit_mb is not None:
            require_resident(limit_mb)

    return watch


def _least_limit(bound: int, soft: int, hard: int) -> int:
    limits = (bound, soft, hard)
    return min(limit for limit in limits if limit != resource.RLIM_INFINITY)


def _stopped(limit_mb: int) -> MemoryLimit:
    return MemoryLimit(
        f"the job was stopped at limits.max_memory_mb = {limit_mb} in client.toml: its result is "
        "dropped; raise the limit, or ask the central site for a smaller batch (micro_batch_size), "
        'shorter rows (max_length) or quantization = "nf4"'
    )
