"""Which piece of work a checkpoint belongs to: job, adapter, base model, records, computing.

Two rounds of which one of these differs do not continue each other. Digests only: nothing of
a record can be read from them.
"""

import hashlib
from collections.abc import Sequence

import torch

from fedpeft import __version__
from fedpeft.adapters import AdapterState
from fedpeft.data import EncodedExample
from fedpeft.models import AdaptedModel
from fedpeft.protocol import Job
from fedpeft_client.rounds.clinic import Clinic
from fedpeft_client.rounds.records import ClinicRows

Undertaking = dict[str, str]
"""By a word for people, in the order in which a difference is named."""


def undertaking_of(
    clinic: Clinic, job: Job, start: AdapterState, rows: ClinicRows, model: AdaptedModel
) -> Undertaking:
    """Return what determines the round's result, beside chance: the same for the same.

    ``start`` is the adapter that the round begins with, the clinic's own factors included.
    Flower's number of the run is not in it: the server gives a new one when it is restarted.
    """
    return {
        "federation": clinic.federation,
        "clinic": clinic.name,
        "run": job.run,
        "round": str(job.round),
        "base model": job.fingerprint,
        "job": _sha256(job.to_json().encode()),
        "adapter": _sha256(start.schema.hash.encode(), _raw(start.values)),
        "records": _records(rows.examples),
        "computing": _computing(model),
    }


def differences(found: Undertaking, wanted: Undertaking) -> list[str]:
    """Return in which respects the two are not the same."""
    return [word for word in wanted if found.get(word) != wanted[word]]


def _records(examples: Sequence[EncodedExample]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        patient = (example.patient_id or "").encode()
        digest.update(len(example.input_ids).to_bytes(8) + len(patient).to_bytes(8))
        digest.update(example.input_ids.tobytes())
        digest.update(example.targets.tobytes())
        digest.update(patient)
    return digest.hexdigest()


def _computing(model: AdaptedModel) -> str:
    """Return what the last bits of a float depend on."""
    return (
        f"fedpeft {__version__}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads, {model.device.type}, {model.base.network.dtype}"
    )


def _raw(values: torch.Tensor) -> bytes:
    return values.contiguous().view(torch.uint8).numpy().tobytes()


def _sha256(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()
