"""Every strategy over whole runs: what is sent, what is published, and what is refused."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from fedpeft.cli import program as fedpeft
from fedpeft.data import encode, read_records
from fedpeft.models import load_tokenizer
from fedpeft.simulation.run import Simulation
from fedpeft_server.runs.directory import RoundRecord
from fedpeft_strategies import STRATEGIES, declarations
from tests.integration.federations import (
    MAX_LENGTH,
    Listener,
    adapter_after,
    federation,
    product_distance,
    rows_of,
    run,
    write_clinic,
)

TURNS = ("B", "A", "B")
SENT = {
    "fedavg": ("AB",) * 3,
    "alternating": TURNS,
    "ffa": ("B",) * 3,
    "flexlora": ("AB",) * 3,
    "fedex": ("AB",) * 3,
    "flora": ("AB",) * 3,
    "fedsa": ("A",) * 3,
    "median": TURNS,
    "trimmed-mean": TURNS,
    "multi-krum": TURNS,
    "norm-bound": TURNS,
}
"""The factors of three rounds; a wrapper sends what its inner strategy does."""
ROUNDS = [0, 1, 2, 3]


@dataclass(frozen=True)
class Case:
    """A strategy, around another one if it is a wrapper, and who opens what."""

    name: str
    inner: str = ""
    mode: str = "sealed"

    def __str__(self) -> str:
        return "-".join(part for part in (self.name, self.inner, self.mode) if part)

    @property
    def sent(self) -> tuple[str, ...]:
        return SENT[self.inner or self.name]

    @property
    def clinics(self) -> int:
        # Of fewer than 2f + 3 Krum's score is of no neighbours.
        return 5 if self.name == "multi-krum" else 3


SEALED = [Case(each.name, inner) for each in declarations() for inner in each.wraps or ("",)]
SUMMED = [
    replace(case, mode="secagg") for case in SEALED if STRATEGIES[case.name].declaration.linear
]
GLOBAL = [
    Case(each.name, each.wraps[0] if each.wraps else "")
    for each in declarations()
    if not each.personal
]


@dataclass(frozen=True)
class Finished:
    """A run that has come to its end."""

    simulation: Simulation
    heard: Listener

    @property
    def last(self) -> RoundRecord:
        return self.heard.records[-1]


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path
) -> Callable[[Case], Finished]:
    """Run a case for three rounds, once for all tests."""
    known: dict[Case, Finished] = {}

    def of(case: Case) -> Finished:
        if case not in known:
            folder = tmp_path_factory.mktemp(str(case))
            plan = federation(
                folder,
                tiny_model,
                case.name,
                mode=case.mode,
                clinics=case.clinics,
                training={"proximal_mu": 0.01} if case.name == "fedprox" else {},
                settings={"inner": case.inner} if case.inner else {},
            )
            known[case] = Finished(plan, run(plan))
        return known[case]

    return of


@pytest.mark.parametrize("case", [*SEALED, *SUMMED], ids=str)
def test_every_strategy_runs_and_its_records_tell_which_factors_were_sent(
    case: Case, finished: Callable[[Case], Finished]
) -> None:
    done = finished(case)
    records = done.heard.records
    assert done.heard.repeated == []
    personal = STRATEGIES[case.name].declaration.personal
    assert [("does nothing by itself" in each) for each in done.heard.warnings] == [True] * personal
    assert [record.round for record in records] == ROUNDS
    assert [record.sent for record in records] == [None, *case.sent]
    for record in records:
        assert record.failed == ()
        clinics = case.clinics if record.round else 0
        assert record.participants == tuple(f"c{at}" for at in range(clinics))
        assert record.valid_loss is not None and math.isfinite(record.valid_loss)
        assert record.confidentiality is not None and record.confidentiality.mode == case.mode
    # Clinics learn questions that only they have, so each strategy lowers the loss, those
    # with momentum by little in their first rounds.
    assert done.last.valid_loss < 0.99 * records[0].valid_loss  # pyright: ignore
    before, after = (adapter_after(done.simulation, number) for number in (2, 3))
    assert before.schema != after.schema or not before.values.equal(after.values)
    after.require_finite(source="the run")


def test_every_strategy_is_tried_here() -> None:
    assert {case.name for case in SEALED} == STRATEGIES.keys()
    assert SENT.keys() == {name for name, each in STRATEGIES.items() if not each.declaration.wraps}


# What is published, for others to load

STOCK = """
import json, sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
given = json.load(sys.stdin)
losses = []
for adapter, rows in given["adapters"]:
    base = AutoModelForCausalLM.from_pretrained(given["base"], dtype=torch.float32)
    model = PeftModel.from_pretrained(base, adapter).eval()
    nll, tokens = 0.0, 0
    for ids, targets in rows:
        logits = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        there = torch.tensor(targets[1:], dtype=torch.bool)
        found = logits.gather(1, torch.tensor(ids[1:])[:, None])[:, 0][there]
        nll, tokens = nll - float(found.detach().double().sum()), tokens + int(there.sum())
    losses.append(nll / tokens)
assert "fedpeft" not in sys.modules
json.dump(losses, sys.stdout)
"""


def validation_rows(simulation: Simulation) -> Path:
    """The rows on which the clinics of a run validate, in one file."""
    folder = simulation.relative_to
    texts = [(folder / str(entry.valid)).read_text() for entry in simulation.settings.clinic]
    (folder / "valid.jsonl").write_text("".join(texts))
    return folder / "valid.jsonl"


def stock_losses(model: Path, runs: list[Simulation]) -> list[float]:
    """The losses of the runs' adapters as anybody would load them, without fedpeft."""
    tokenizer = load_tokenizer(model)
    adapters: list[tuple[str, list[tuple[list[int], list[bool]]]]] = []
    for each in runs:
        encoded = encode(read_records(validation_rows(each)), tokenizer, max_length=MAX_LENGTH)
        assert encoded.truncated == 0
        rows = [(one.input_ids.tolist(), one.targets.tolist()) for one in encoded.examples]
        adapters.append((str(each.out / "adapter"), rows))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", STOCK],
        input=json.dumps({"base": str(model), "adapters": adapters}),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def evaluated(model: Path, adapter: Path, data: Path, out: Path) -> float:
    """The loss that ``fedpeft evaluate`` finds."""
    places = ("--model", model, "--adapter", adapter, "--data", data, "--json", out)
    with pytest.raises(SystemExit) as ended:
        fedpeft.run(["evaluate", *map(str, places), "--dtype", "float32"])
    assert not ended.value.code
    return json.loads(out.read_text())["loss"]


def test_the_published_adapter_has_the_loss_of_the_last_round_wherever_it_is_loaded(
    finished: Callable[[Case], Finished], tiny_model: Path, tmp_path: Path
) -> None:
    done = [finished(case) for case in GLOBAL]
    recorded = {str(case): each.last.valid_loss for case, each in zip(GLOBAL, done, strict=True)}
    runs = [each.simulation for each in done]
    stock = dict(zip(recorded, stock_losses(tiny_model, runs), strict=True))
    assert stock == pytest.approx(recorded, rel=1e-4)
    own = [
        evaluated(tiny_model, each.out / "adapter", validation_rows(each), tmp_path / "found.json")
        for each in runs
    ]
    assert dict(zip(recorded, own, strict=True)) == pytest.approx(recorded, rel=1e-5)


# What is sent


def rounding(record: RoundRecord, coordinates: int) -> float:
    """The length of the error that quantisation leaves in the mean of all five clinics.

    Each rounds a coordinate up or down by chance, with a variance of at most step²/4.
    """
    found = record.confidentiality
    assert found is not None and found.limit is not None and found.bits is not None
    step = 2 * found.limit / (2**found.bits - 1)
    rows = sum(map(rows_of, range(5)))
    return step / 2 * math.sqrt(found.survivors * coordinates) / rows


@pytest.mark.parametrize("mode", ["sealed", "secagg"])
def test_alternating_sends_about_half_of_what_fedavg_does(
    mode: str, tmp_path: Path, embedded_model: Path
) -> None:
    records: dict[str, list[RoundRecord]] = {}
    for name in ("fedavg", "alternating"):
        plan = federation(
            tmp_path / name,
            embedded_model,
            name,
            mode=mode,
            clinics=3,
            training={"local_steps": 1},
            adapter={"rank": 16},
        )
        records[name] = run(plan).records
    for ours, theirs in list(zip(records["alternating"], records["fedavg"], strict=True))[1:]:
        assert ours.bytes_up <= 0.6 * theirs.bytes_up
        # The first time a clinic is sent an adapter, it is the whole of it.
        assert ours.round == 1 or ours.bytes_down <= 0.65 * theirs.bytes_down


def test_the_secure_sum_of_alternating_is_its_mean_up_to_quantisation(
    tmp_path: Path, tiny_model: Path
) -> None:
    # Steps of gradient descent: those of Adam have the sign of a gradient however small it is.
    steps = {"optimizer": "sgd", "learning_rate": 0.5}
    plans = {
        mode: federation(tmp_path / mode, tiny_model, mode=mode, training=steps)
        for mode in ("sealed", "secagg")
    }
    heard = {mode: run(plan) for mode, plan in plans.items()}
    start, after = (adapter_after(plans["sealed"], number) for number in (0, 3))
    errors = 0.0
    for number, factor in enumerate(TURNS, start=1):
        sealed, summed = (adapter_after(plans[mode], number) for mode in ("sealed", "secagg"))
        record = heard["secagg"].records[number]
        errors += rounding(record, sealed.schema.part(factor).numel)
        distance = product_distance(sealed, summed)
        if number == 1:
            # Variances of u(1 - u) are 1/6 in the mean, so it is 0.82 of the bound; the sum of
            # thousands of them hardly spreads.
            assert 0.7 * errors < distance < errors
        # Later rounds also train from the errors before, which lengthens them: to 1.4 here.
        assert distance < 2 * errors
    assert 2 * errors < 0.02 * product_distance(after, start)


# What cannot be run

IMPOSSIBLE: dict[str, tuple[list[str], str]] = {
    "single updates under a secure sum": (
        ["strategy.name=flexlora"],
        "strategy.name = 'flexlora' needs single updates",
    ),
    "a changed base of four bits": (
        ["strategy.name=fedex", "aggregation.confidentiality=sealed", "model.quantization=nf4"],
        "alters no 4-bit code and is lost",
    ),
    "a part that stays under shared noise": (
        [
            *("strategy.name=fedsa", "training.local_steps=1", "training.optimizer=sgd"),
            *("privacy.unit=record", "privacy.mechanism=distributed"),
            "privacy.noise_multiplier=1.0",
        ],
        'privacy.mechanism = "distributed" does not protect what clinics send',
    ),
    "an unknown name": (["strategy.name=fedavgg"], "the nearest name is 'fedavg'"),
}


def exit_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[object, str]:
    with pytest.raises(SystemExit) as stopped:
        fedpeft.run(arguments)
    (line,) = capsys.readouterr().err.splitlines()
    return stopped.value.code, line


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_what_cannot_be_run_is_refused_before_anything_is_written(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen, says = IMPOSSIBLE[name]
    options = [part for each in chosen for part in ("--set", each)]
    code, line = exit_of(["simulate", "--out", str(tmp_path / "out"), *options], capsys)
    assert code == 3
    assert line.startswith("fedpeft: error: ") and says in line
    assert not (tmp_path / "out").exists()


def test_mixed_ranks_are_refused_by_a_strategy_of_one_rank(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = [
        "\n".join(
            f"{key} = {json.dumps(value)}"
            for key, value in write_clinic(tmp_path, name, at).items()
        )
        for at, name in enumerate(("c0", "c1", "c2"))
    ]
    tables = [f'[model]\nbase = "{tiny_model}"', '[strategy]\nname = "fedavg"']
    text = "\n".join([*tables, *(f"[[clinic]]\n{entry}" for entry in entries), "max_rank = 2"])
    (tmp_path / "federation.toml").write_text(text + "\n")
    place = [str(tmp_path / "federation.toml"), "--out", str(tmp_path / "out")]
    code, line = exit_of(["simulate", *place], capsys)
    assert code == 3
    assert "clinic 'c2' has a max_rank below adapter.rank = 8" in line
    assert "strategy.name = 'alternating'" in line
    assert not (tmp_path / "out").exists()
