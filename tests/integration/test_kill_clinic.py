"""A clinic is killed at exact steps of secure sums that cannot do without it, and comes back.

All three must stay to the end, and no round may be repeated: so the run ends unless each box
goes on with the very sum that it was in.
"""

import signal
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch

from fedpeft.adapters import AdapterState, load_adapter
from fedpeft.config import FederationSettings, load_settings
from fedpeft.models import adapter_schema, fingerprint
from fedpeft.protocol import Job, SumTerms
from fedpeft.protocol.parcel import Held
from fedpeft_client.box import open_box
from fedpeft_client.rounds.work import Assignment, ClinicWork
from fedpeft_server.runs.directory import RoundRecord
from tests.integration.test_secagg import FLOAT_NOISE, rounding
from tests.integration.towns import CLINICS, LONGEST_S, SERVER, Town, town

# ``message-in`` stands in the log before a step is begun; ``message-out`` before its answer
# leaves, which is computed and kept by then. All die twice in one and the same round.
MOMENTS = {
    "bay": [("message-in", "train.keys"), ("message-out", "train.shares")],
    "cape": [("message-in", "train.masked"), ("message-in", "train.unmask")],
    "delta": [("message-out", "train.masked"), ("message-out", "train.unmask")],
}
SETTINGS = {
    "rounds": {
        "count": 1,
        "minimum_clinics": 3,
        "wait_s": 120,
        "gather_s": 1,
        "timeout_s": 60,
        "retries": 0,
    },
    "aggregation": {"confidentiality": "secagg", "threshold": 3, "stage_timeout_s": 60},
    "training": {
        "local_steps": 1,
        "batch_size": 4,
        "max_length": 64,
        "schedule": "constant",
        "warmup_steps": 0,
    },
}


def fatal(name: str, number: int) -> dict[str, str | int] | None:
    """Return where a clinic dies that has died ``number`` times."""
    if number == len(MOMENTS[name]):
        return None
    kind, step = MOMENTS[name][number]
    return {"kind": kind, "type": step, "round": 1}


def restart_until_finished(made: Town) -> Counter[str]:
    """Start clinics again that were killed, and return how often each was."""
    deaths, deadline = Counter[str](), time.monotonic() + LONGEST_S
    while made.code(SERVER) is None:
        assert time.monotonic() < deadline, made.told(SERVER)
        for name in CLINICS:
            if (code := made.code(name)) is not None:
                assert code == -signal.SIGKILL, made.told(name)
                deaths[name] += 1
                made.start(name, fatal(name, deaths[name]))
        time.sleep(0.02)
    return deaths


def test_clinics_killed_at_any_step_go_on_with_the_sum_that_needs_them(
    tmp_path: Path, tiny_model: Path
) -> None:
    first = {name: fatal(name, 0) or {} for name in CLINICS}
    with town(tmp_path / "town", tiny_model, SETTINGS, first) as made:
        deaths = {name: len(moments) for name, moments in MOMENTS.items()}
        assert restart_until_finished(made) == deaths
        assert made.code(SERVER) == 0, made.told(SERVER)
        record = RoundRecord.model_validate_json((made.rounds / "1" / "round.json").read_bytes())
        assert record.participants == CLINICS
        assert record.confidentiality is not None
        assert (record.confidentiality.threshold, record.confidentiality.survivors) == (3, 3)
        assert_adapter_is_the_mean(made, record)
        for name in CLINICS:
            code, said = made.do(
                "fedpeft-client", "audit-log", "verify", str(made.root / name / "box")
            )
            assert code == 0, said


def assert_adapter_is_the_mean(made: Town, record: RoundRecord) -> None:
    """The adapter of a round is the mean by rows of what its clinics compute from the last one."""
    settings = load_settings(FederationSettings, made.site / "federation.toml")
    schema = adapter_schema(made.model, settings.adapter)
    before, after = (
        load_adapter(made.rounds / str(number) / "adapter", schema)
        for number in (record.round - 1, record.round)
    )
    job = Job(
        federation=settings.name,
        run="1" * 32,
        fingerprint=fingerprint(made.model),
        quantization=settings.model.quantization,
        adapter=settings.adapter,
        training=settings.training,
        aggregation=SumTerms(confidentiality="sealed", adversary="curious", bits=16, limit=1.0),
        round=record.round,
        rounds=settings.rounds.count,
    )
    total, rows = torch.zeros_like(before.values), 0
    for name in record.participants:
        box = open_box(made.root / name / "box")
        # With its records, but with nothing that it remembers.
        clinic = replace(
            box.clinic(box.load_identity(lambda: "")),
            ledger=made.root / name / "anew.sqlite",
            checkpoint_directory=None,
        )
        trained = ClinicWork().train(clinic, Assignment(job, Held(before), schema.hash, 1))
        total += trained.rows * trained.update.values
        rows += trained.rows
    expected = AdapterState(schema, before.values + total / rows)
    off = float((after.values - expected.values).abs().max())
    bound = rounding(record, rows) + FLOAT_NOISE
    assert off <= bound, record.round
    assert float((after.values - before.values).abs().max()) > 20 * bound
