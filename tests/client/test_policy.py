"""The clinic's rules, one by one: what each refuses, and that the box alone is told why."""

import dataclasses
import datetime
import json
import os
import shutil
import subprocess
import sys
import textwrap
import threading
import tomllib
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from fedpeft.config import AdapterSettings, TrainingSettings, parse_settings
from fedpeft.errors import (
    BaseNotAllowed,
    ConfigError,
    DiskLimit,
    MemoryLimit,
    MethodNotAllowed,
    OutsideHours,
    PolicyRefused,
    SecAggRequired,
    SignerNotAllowed,
    StorageError,
    TrafficLimit,
)
from fedpeft.models import fingerprint
from fedpeft.protocol import EVALUATE, TRAIN, Job, SumTerms
from fedpeft.sealing import Identity
from fedpeft.training import Place, StepDone
from fedpeft_client.limits.memory import bounded_memory, least_bytes, require_memory
from fedpeft_client.limits.policy import require_allowed, within_hours
from fedpeft_client.limits.refusals import RefusalFile
from fedpeft_client.limits.traffic import TrafficMeter, read_day
from fedpeft_client.limits.working_hours import is_open, next_opening, parse_window
from fedpeft_client.rounds.clinic import Clinic, Membership, clinic_of
from fedpeft_client.settings import (
    BoxModelSettings,
    ClientSettings,
    ConfidentialitySettings,
    DataSettings,
    LimitSettings,
    PolicySettings,
    ServerSettings,
    settings_toml,
)

OWN, SERVER = Identity.generate(), Identity.generate()
MIB = 1 << 20
MONDAY_NOON = datetime.datetime(2026, 11, 23, 12, 0, tzinfo=datetime.UTC)
SECAGG = SumTerms(confidentiality="secagg", adversary="active", bits=16, limit=1.0)
SEALED = SECAGG.model_copy(update={"confidentiality": "sealed"})


def at(text: str) -> datetime.datetime:
    """Return a moment of a week, ``mon 19:00``; the 23rd of November 2026 was a Monday."""
    day, clock = text.split()
    hour, minute = map(int, clock.split(":"))
    ahead = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"].index(day)
    return MONDAY_NOON.replace(hour=hour, minute=minute) + datetime.timedelta(days=ahead)


@pytest.fixture
def clinic(tiny_model: Path, tmp_path: Path) -> Clinic:
    return Clinic(
        name="north",
        federation="sea",
        membership=Membership(OWN, SERVER.public),
        model=tiny_model,
        data=DataSettings(train=tmp_path / "t.jsonl"),
        ledger=tmp_path / "ledger.sqlite",
        limits=LimitSettings(min_free_disk_mb=0),
    )


def ruled(clinic: Clinic, **rules: Any) -> Clinic:
    return dataclasses.replace(clinic, policy=PolicySettings(**rules))


def limited(clinic: Clinic, **limits: Any) -> Clinic:
    return dataclasses.replace(clinic, limits=LimitSettings(**limits))


def job_for(clinic: Clinic, **changes: Any) -> Job:
    job = Job(
        run="0" * 32,
        federation="sea",
        fingerprint=fingerprint(clinic.model),
        quantization="none",
        adapter=AdapterSettings(rank=2),
        training=TrainingSettings(),
        aggregation=SECAGG,
        round=1,
        rounds=3,
    )
    return job.model_copy(update=changes)


def judge(clinic: Clinic, kind: str = TRAIN, now: datetime.datetime = MONDAY_NOON, **job: Any):
    require_allowed(clinic, job_for(clinic, **job), kind, now)


# Who may order


def test_an_order_of_a_server_that_is_not_listed_is_refused(clinic: Clinic):
    strict = ruled(clinic, signers=[Identity.generate().public.fingerprint])
    for kind in (TRAIN, EVALUATE):
        with pytest.raises(SignerNotAllowed, match=SERVER.public.fingerprint):
            judge(strict, kind)
    judge(ruled(clinic, signers=[SERVER.public.fingerprint]))


# Confidentiality, base model, method


def test_a_sealed_job_is_refused_where_secure_aggregation_is_demanded(clinic: Clinic):
    with pytest.raises(SecAggRequired):
        judge(clinic, aggregation=SEALED)
    lenient = ConfidentialitySettings(require_secagg=False)
    judge(dataclasses.replace(clinic, aggregation=lenient), aggregation=SEALED)


def test_a_base_model_that_is_not_listed_is_refused_although_it_lies_here(clinic: Clinic):
    with pytest.raises(BaseNotAllowed, match="ffffffffffff only"):
        judge(ruled(clinic, base_models=["f" * 64]))
    judge(ruled(clinic, base_models=["f" * 64, fingerprint(clinic.model)]))


def test_without_a_list_the_fingerprint_of_the_invitation_is_the_rule(tmp_path: Path):
    def allowed(own: str | None, listed: tuple[str, ...] | None) -> tuple[str, ...] | None:
        settings = ClientSettings(
            clinic="a",
            server=ServerSettings(address="h:1", federation="f"),
            model=BoxModelSettings(directory=Path("m"), fingerprint=own),
            data=DataSettings(train=Path("t")),
            policy=PolicySettings(base_models=listed),
        )
        return clinic_of(settings, tmp_path, Membership(OWN, SERVER.public)).policy.base_models

    assert allowed("a" * 64, None) == ("a" * 64,)
    assert allowed("a" * 64, ("b" * 64,)) == ("b" * 64,)
    assert allowed(None, None) is None


@pytest.mark.parametrize(
    ("changes", "method"),
    [
        ({"trains": "AB", "sends": "A"}, "personal"),
        ({"base_change": ("a" * 64,)}, "base-change"),
    ],
)
def test_a_method_that_is_not_listed_is_refused(
    changes: dict[str, Any], method: str, clinic: Clinic
):
    strict = ruled(clinic, methods=["lora"])
    with pytest.raises(MethodNotAllowed, match=method):
        judge(strict, **changes)
    judge(strict)
    judge(strict, trains="B", sends="B")
    judge(ruled(clinic, methods=["lora", method]), **changes)


# Hours


@pytest.mark.parametrize(
    "text",
    [
        *("", "19:00", "19:00-19:00", "24:00-06:00", "24:30-06:00", "25:00-06:00", "19:60-20:00"),
        *("mon-fri", "mon fri 19:00-06:00", "xyz 19:00-06:00", "mon- 19:00-06:00"),
        *("mon,,tue 19:00-06:00", "19:00 - 06:00", "19-06", "19:00-06:00;"),
    ],
)
def test_what_is_no_window_is_refused_where_it_is_written(text: str):
    with pytest.raises(ConfigError, match="no window of time"):
        parse_window(text)
    with pytest.raises(ConfigError, match=r"hours.*no window of time"):
        parse_settings(PolicySettings, {"hours": [text]}, [], where="client.toml")


@pytest.mark.parametrize(
    ("window", "inside", "outside"),
    [
        ("08:00-10:00", ["mon 08:00", "sun 09:59"], ["mon 07:59", "mon 10:00"]),
        ("19:00-06:00", ["mon 19:00", "mon 23:59", "mon 00:00", "tue 05:59"], ["mon 06:00"]),
        ("fri 19:00-06:00", ["fri 19:00", "sat 05:59"], ["fri 05:59", "sat 19:00", "sat 06:00"]),
        ("sun 22:00-02:00", ["sun 23:00", "mon 01:59"], ["mon 02:00", "mon 22:00"]),
        ("sat,sun 00:00-24:00", ["sat 00:00", "sun 23:59"], ["fri 23:59", "mon 00:00"]),
        ("fri-mon 09:00-10:00", ["fri 09:00", "sun 09:30", "mon 09:59"], ["tue 09:00"]),
        ("22:00-00:00", ["mon 23:59"], ["mon 00:00", "mon 21:59"]),
        ("MON-FRI 8:00-9:00".replace("8:", "08:").replace("9:", "09:"), ["mon 08:30"], []),
    ],
)
def test_a_window_holds_from_its_begin_to_before_its_end(
    window: str, inside: list[str], outside: list[str]
):
    for moment in inside:
        assert is_open([window], at(moment)), moment
    for moment in outside:
        assert not is_open([window], at(moment)), moment


def test_the_next_opening_is_the_first_of_all_windows():
    windows = ["sat,sun 00:00-24:00", "mon-fri 19:00-06:00"]
    assert next_opening(windows, at("mon 12:00")) == at("mon 19:00")
    assert next_opening(["mon 11:00-12:00"], at("mon 12:00")) == at("mon 11:00") + (
        datetime.timedelta(days=7)
    )


def test_training_outside_of_the_hours_is_refused_and_measuring_is_not(clinic: Clinic):
    night = ruled(clinic, hours=["mon-fri 19:00-06:00"])
    with pytest.raises(OutsideHours, match=r"Mon 12:00.*from Mon 19:00: nothing was trained"):
        judge(night)
    judge(night, EVALUATE)
    judge(night, now=at("mon 19:00"))


def test_training_ends_with_its_hours_unless_it_is_done(clinic: Clinic):
    night = ruled(clinic, hours=["19:00-06:00"])
    seen: list[StepDone] = []
    clock = [at("tue 05:59")]
    watch = within_hours(seen.append, night, lambda: clock[0])
    place = Place("north", 1, 1)
    watch(StepDone(place, 1, 3, 1.0, 1.0))
    clock[0] = at("tue 06:00")
    with pytest.raises(OutsideHours, match="training was stopped"):
        watch(StepDone(place, 2, 3, 1.0, 1.0))
    watch(StepDone(place, 3, 3, 1.0, 1.0))
    assert [done.step for done in seen] == [1, 2, 3]


# Disk


def test_too_little_free_disk_is_refused_before_anything_is_done(clinic: Clinic):
    free = shutil.disk_usage(clinic.ledger.parent).free // MIB
    for kind in (TRAIN, EVALUATE):
        with pytest.raises(DiskLimit, match="min_free_disk_mb"):
            judge(limited(clinic, min_free_disk_mb=free * 2), kind)


def test_the_disk_of_a_folder_that_is_not_made_yet_is_that_of_the_folder_above(clinic: Clinic):
    judge(dataclasses.replace(clinic, adapter_directory=clinic.ledger.parent / "x" / "adapter"))


# Memory


def test_a_job_that_cannot_fit_is_refused_before_anything_is_loaded(clinic: Clinic):
    big = job_for(clinic, adapter=AdapterSettings(rank=4096))
    needed = least_bytes(clinic, big, TRAIN) // MIB
    assert needed >= 2
    with pytest.raises(MemoryLimit, match="max_memory_mb = 1 "):
        require_memory(limited(clinic, max_memory_mb=1), big, TRAIN)
    require_memory(limited(clinic, max_memory_mb=needed + 1), big, TRAIN)
    require_memory(clinic, big, TRAIN)


def test_the_least_that_is_needed_follows_the_job(clinic: Clinic):
    plain = job_for(clinic)
    least = least_bytes(clinic, plain, TRAIN)
    assert least_bytes(clinic, job_for(clinic, adapter=AdapterSettings(rank=8)), TRAIN) > least
    assert least_bytes(clinic, plain, EVALUATE) < least
    assert least_bytes(clinic, job_for(clinic, quantization="nf4"), TRAIN) < least
    assert least_bytes(dataclasses.replace(clinic, dtype="float32"), plain, TRAIN) > least


_GROWING = """
    import psutil, torch
    from fedpeft.errors import MemoryLimit
    from fedpeft_client.limits.memory import bounded_memory
    limit = psutil.Process().memory_info().rss // 2**20 + 64
    for ask in (lambda: torch.ones(2**26), lambda: bytearray(2**28)):
        try:
            with bounded_memory(limit):
                torch.ones(2**20)
                ask()
        except MemoryLimit as error:
            print(error.reason)
    kept = torch.ones(2**26)
    try:
        with bounded_memory(limit):
            print("entered")
    except MemoryLimit as error:
        print("already", error.reason)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA is enforced by Linux alone")
def test_the_system_refuses_what_a_job_asks_beyond_the_limit_and_gives_it_afterwards():
    script = textwrap.dedent(_GROWING)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.split("\n")[:-1] == [
        "memory-limit",
        "memory-limit",
        "already memory-limit",
    ], done.stderr


def test_other_errors_are_not_taken_for_the_limit():
    with pytest.raises(RuntimeError, match="a shape"), bounded_memory(1 << 20):
        raise RuntimeError("a shape does not fit")
    with pytest.raises(StorageError), bounded_memory(1 << 20):
        raise StorageError("no memory stick")


# Processors


_THREADS = """
    import os, torch
    from fedpeft_client.limits.processors import bound_processors
    bound_processors(1)
    from concurrent.futures import ThreadPoolExecutor
    with ThreadPoolExecutor(1) as pool:
        print(torch.get_num_threads(), len(pool.submit(os.sched_getaffinity, 0).result()))
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no processor affinity here")
def test_all_threads_share_the_processors_that_are_allowed():
    script = textwrap.dedent(_THREADS)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.split() == ["1", "1"], done.stderr


# Bytes a day


class Days:
    """A calendar that a test turns."""

    def __init__(self) -> None:
        self.day = datetime.date(2026, 11, 23)

    def __call__(self) -> datetime.date:
        return self.day

    def pass_(self, days: int) -> None:
        self.day += datetime.timedelta(days=days)


def test_bytes_beyond_the_limit_are_refused_until_midnight(tmp_path: Path):
    days = Days()
    meter = TrafficMeter(tmp_path / "t.json", 10 * MIB, days)
    meter.count(9 * MIB)
    meter.require(MIB)
    with pytest.raises(TrafficLimit, match=r"2026-11-23.*9\.0 MiB"):
        meter.require(MIB + 1)
    meter.count(MIB)
    with pytest.raises(TrafficLimit):
        meter.require(0)
    days.pass_(1)
    meter.require(10 * MIB)


def test_the_count_outlives_a_clean_end_to_the_byte(tmp_path: Path):
    path, days = tmp_path / "t.json", Days()
    meter = TrafficMeter(path, 10 * MIB, days)
    meter.count(3 * MIB + 7)
    meter.close()
    assert TrafficMeter(path, 10 * MIB, days).left() == 7 * MIB - 7


@pytest.mark.parametrize("size", [1, 1000, MIB - 1, MIB, MIB + 1, 5 * MIB])
def test_after_a_crash_the_count_is_never_too_low_and_a_little_too_high(size: int, tmp_path: Path):
    path, days = tmp_path / "t.json", Days()
    meter, counted = TrafficMeter(path, None, days), 0
    for _ in range(5):
        meter.count(size)
        counted += size
        known = read_day(path)
        assert known is not None
        assert counted <= known.bytes <= counted + MIB + size


def test_a_clock_that_is_set_back_gives_no_byte_a_second_time(tmp_path: Path):
    days = Days()
    meter = TrafficMeter(tmp_path / "t.json", 10 * MIB, days)
    meter.count(10 * MIB)
    for back in (-1, -400):
        days.pass_(back)
        assert meter.left() == 0
    days.pass_(1)
    assert meter.left() == 10 * MIB


def test_many_threads_lose_no_byte(tmp_path: Path):
    meter = TrafficMeter(tmp_path / "t.json", 100 * MIB, Days())

    def count() -> None:
        for _ in range(500):
            meter.count(11)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert meter.left() == 100 * MIB - 4 * 500 * 11


@pytest.mark.parametrize(
    "content", ["", "{}", "[]", '{"schema": 2, "day": "2026-11-23", "bytes": 1}', '{"schema": 1}']
)
def test_a_damaged_count_is_no_fresh_day(content: str, tmp_path: Path):
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(StorageError, match="remove it"):
        TrafficMeter(tmp_path / "t.json", MIB)


# What the box says


def test_the_last_refusal_is_kept_whole(tmp_path: Path):
    file = RefusalFile(tmp_path / "refusal.json")
    assert file.read() is None
    for error in (DiskLimit("1 MiB is free"), OutsideHours("it is Mon 12:00")):
        file.note(error.reason, str(error))
    kept = file.read()
    assert kept is not None
    assert (kept.rule, kept.sentence) == ("outside-hours", "it is Mon 12:00")


@pytest.mark.parametrize("content", ["", "{}", json.dumps({"time": "x"}), "[]"])
def test_a_damaged_refusal_is_named(content: str, tmp_path: Path):
    (tmp_path / "refusal.json").write_text(content)
    with pytest.raises(StorageError, match="remove it"):
        RefusalFile(tmp_path / "refusal.json").read()


def test_a_refusal_that_cannot_be_kept_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "file").touch()
    RefusalFile(tmp_path / "file" / "refusal.json").note("disk-limit", "1 MiB is free")
    assert "cannot write" in caplog.text


# Settings


@pytest.mark.parametrize(
    "rules",
    [
        *({name: []} for name in ("signers", "base_models", "methods", "hours")),
        {"signers": ["a" * 64]},
        {"base_models": ["a" * 63]},
        {"methods": ["dora"]},
    ],
)
def test_a_rule_that_is_none_is_refused(rules: dict[str, Any]):
    with pytest.raises(ValidationError):
        PolicySettings(**rules)


def test_rules_survive_the_file_that_join_writes(tmp_path: Path):
    policy = PolicySettings(
        signers=(SERVER.public.fingerprint,),
        base_models=("a" * 64,),
        methods=("lora", "personal"),
        hours=("mon-fri 19:00-06:00", "sat,sun 00:00-24:00"),
    )
    settings = ClientSettings(
        clinic="a",
        server=ServerSettings(address="h:1", federation="f"),
        model=BoxModelSettings(directory=Path("m")),
        data=DataSettings(train=Path("t")),
        limits=LimitSettings(max_memory_mb=4096, max_mb_per_day=2000),
        policy=policy,
    )
    for each in (settings, settings.model_copy(update={"policy": PolicySettings()})):
        assert ClientSettings.model_validate(tomllib.loads(settings_toml(each))) == each


def test_every_rule_has_a_name_of_its_own():
    rules = [SecAggRequired, BaseNotAllowed, MethodNotAllowed, OutsideHours, DiskLimit, MemoryLimit]
    rules += [SignerNotAllowed, TrafficLimit, PolicyRefused]
    assert len({rule.reason for rule in rules}) == len(rules)
