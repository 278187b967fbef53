"""What privacy costs and what it buys: the embedded federation with canaries, then audited.

For each epsilon (``none``: without differential privacy) the clinics' files get
canaries and lose the patients that a coin holds out, the federation trains on
them, and the final adapter is attacked. One JSON line for each run, and the bars
in the last line.

    python benchmarks/privacy_utility.py --overfit
    python benchmarks/privacy_utility.py --epsilon 8 none 16 4 2 1

``--overfit`` trains on purpose for many rounds on few records, without privacy. Private
runs are of the mechanism ``distributed`` on all records at once, unless ``--local``.
"""

import argparse
import json
import math
import random
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from report import bar, emit

OVERFIT = ["training.local_steps=25", "adapter.rank=32", "training.learning_rate=5e-3"]
OVERFIT_ROWS, OVERFIT_ROUNDS = 100, 8


HONEST, DELTA = 4, 1e-5
LEARNING_RATE, NOISE_AT_8 = 14.5, 3.31
DISTRIBUTED = [
    f"privacy.honest_clinics={HONEST}",
    "rounds.minimum_clinics=4",
    "rounds.count=20",
    "adapter.rank=2",
    "adapter.alpha=4",
    "training.optimizer=sgd",
    "training.local_steps=1",
    "training.batch_size=1300",
    "training.micro_batch_size=64",
    "training.schedule=constant",
    "training.warmup_steps=0",
    "privacy.mechanism=distributed",
]


def main() -> None:
    """Run every setting in turn and print the figures."""
    options = _options()
    with tempfile.TemporaryDirectory() as place:
        folder = options.out or Path(place)
        runs = [
            _run(folder / f"epsilon-{epsilon}", epsilon, options) for epsilon in options.epsilon
        ]
    emit("privacy_utility", {"settings": _settings_of(options), "runs": runs}, _bars(runs, options))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epsilon", nargs="+", default=["none"], help="'none', or a number")
    parser.add_argument("--unit", choices=("record", "patient"), default="record")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--set", dest="overrides", nargs="*", default=[], help="table.key=value")
    parser.add_argument(
        "--set-private", dest="private", nargs="*", default=[], help="the same, with privacy only"
    )
    parser.add_argument("--local", action="store_true", help="the mechanism 'local'")
    parser.add_argument("--rows", type=int, help="records a clinic keeps, before planting")
    parser.add_argument("--canaries", type=int, default=4, help="per clinic and repetition")
    parser.add_argument("--share", type=float, default=0.3, help="of patients who get a coin")
    parser.add_argument("--samples", type=int, default=256, help="secrets to rank each among")
    parser.add_argument("--overfit", action="store_true", help="many rounds on few records")
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--out", type=Path, help="keep runs, keys and pictures here")
    options = parser.parse_args()
    if options.overfit:
        options.overrides = OVERFIT + options.overrides
        options.rows, options.rounds = options.rows or OVERFIT_ROWS, OVERFIT_ROUNDS
        options.share = 1.0
    return options


def _settings_of(options: argparse.Namespace) -> dict[str, Any]:
    return {
        key: str(value) for key, value in vars(options).items() if key not in ("out", "epsilon")
    }


def _run(place: Path, epsilon: str, options: argparse.Namespace) -> dict[str, Any]:
    from fedpeft.audit import Attack, draw, run_audit
    from fedpeft.demo.clinics import write_federation
    from fedpeft.simulation.display import Display
    from fedpeft.simulation.plan import embedded_settings
    from fedpeft.simulation.run import Simulation, simulate

    shutil.rmtree(place, ignore_errors=True)
    settings = embedded_settings(_overrides(epsilon, options))
    clinics = write_federation(place / "data")
    keys = tuple(_plant(place, clinic, options) for clinic in clinics)
    planted = tuple(
        entry.model_copy(update={"train": place.resolve() / "planted" / f"{entry.name}.jsonl"})
        for entry in settings.clinic
    )
    settings = settings.model_copy(update={"clinic": planted})
    with Display().stage(
        f"epsilon {epsilon}", rounds=settings.rounds.count, clinics=len(clinics), quiet=True
    ) as stage:
        data = (place / "data").resolve()
        simulate(Simulation(settings, data, place / "run"), stage, stage.observe)
    adapter = place / "run" / "adapter"
    attack = Attack(model=settings.model, adapter=adapter, keys=keys, samples=options.samples)
    report = run_audit(attack, _tell)
    (place / "audit.svg").write_text(draw(report))
    (place / "audit.json").write_text(json.dumps(report.as_json(), indent=1))
    found = {"epsilon": epsilon, **_losses(settings, clinics, adapter), **_brief(report.as_json())}
    found["privacy"] = json.loads((place / "run" / "summary.json").read_text()).get("privacy")
    print(json.dumps(found), flush=True)
    return found


def _overrides(epsilon: str, options: argparse.Namespace) -> list[str]:
    common = [f"rounds.count={options.rounds}", *options.overrides]
    if epsilon == "none":
        return common
    private = [f"privacy.unit={options.unit}", f"privacy.epsilon={epsilon}"]
    if options.local:
        return common + private + options.private
    multiplier = _multiplier([*common, *private, *DISTRIBUTED, *options.private], epsilon)
    # More noise takes smaller steps: beyond that of epsilon = 8 training would diverge.
    rate = round(LEARNING_RATE * min(1.0, NOISE_AT_8 / multiplier), 2)
    found = [f"training.learning_rate={rate}", f"privacy.noise_multiplier={multiplier}"]
    return [*common, *private, *DISTRIBUTED, *found, *options.private]


def _multiplier(overrides: list[str], epsilon: str) -> float:
    """Return the noise with which four clinics, one of them against us, keep ``epsilon``.

    All records are in every step, so no sampling helps.
    """
    from fedpeft.models import adapter_schema, resolve_base
    from fedpeft.privacy.calibration import calibrated_skellam
    from fedpeft.privacy.skellam import grid_for, sensitivities
    from fedpeft.simulation.plan import embedded_settings

    settings = embedded_settings([*overrides, "privacy.noise_multiplier=1"])
    clip = settings.privacy.clip if settings.privacy else 1.0
    size = adapter_schema(
        resolve_base(settings.model.base, relative_to=Path()), settings.adapter
    ).numel
    l2, l1 = sensitivities(clip, size, grid_for(clip, size))
    left = calibrated_skellam(float(epsilon), DELTA, 1.0, settings.rounds.count, l2, l1)
    return math.ceil(100 * left * math.sqrt(HONEST / (HONEST - 1))) / 100


def _plant(place: Path, clinic: Any, options: argparse.Namespace) -> Path:
    from fedpeft.audit import Planting, plant

    key, data = place / "keys" / f"{clinic.name}.json", clinic.train
    if options.rows:
        data = _fewer(clinic.train, options.rows, place / "few" / f"{clinic.name}.jsonl")
    draw = random.Random(f"{options.seed}/{clinic.name}")  # noqa: S311  (made-up data)
    out = place / "planted" / f"{clinic.name}.jsonl"
    planting = Planting(canaries=options.canaries, share=options.share)
    _tell(f"{clinic.name}: {plant(data, out, key, planting, draw=draw).describe()}")
    return key


def _fewer(path: Path, rows: int, out: Path) -> Path:
    from fedpeft.data import read_records

    kept = [
        {
            "patient_id": record.patient_id,
            "messages": [{"role": turn.role, "content": turn.text} for turn in record.turns],
        }
        for record in read_records(path).records[:rows]
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(json.dumps(row) + "\n" for row in kept))
    return out


def _losses(settings: Any, clinics: Any, adapter: Path) -> dict[str, Any]:
    """Return the validation loss of base and adapter, nats per answer token over all clinics."""
    from fedpeft.data import encode, read_records
    from fedpeft.evaluation import score
    from fedpeft.evaluation.report import adapted_from
    from fedpeft.models import Workbench

    workbench, found = Workbench(), {}
    for name, directory in (("base_loss", None), ("valid_loss", adapter)):
        model = adapted_from(workbench, settings.model, directory, relative_to=Path())
        rows = [
            row
            for clinic in clinics
            for row in encode(
                read_records(clinic.valid),
                model.base.tokenizer,
                max_length=settings.training.max_length,
            ).examples
        ]
        found[name] = score(model, rows).loss
    return found


def _brief(report: dict[str, Any]) -> dict[str, Any]:
    attacks = report["membership"]["attacks"]
    return {
        "auc": {name: round(found["auc"], 4) for name, found in attacks.items()},
        "auc_interval": {name: found["interval"] for name, found in attacks.items()},
        "tpr": {name: round(found["tpr"], 4) for name, found in attacks.items()},
        "members": report["membership"]["members"],
        "nonmembers": report["membership"]["nonmembers"],
        "extracted": {
            str(each["repetitions"]): f"{each['extracted']}/{each['planted']}"
            for each in report["canaries"]["by_repetition"]
        },
        "exposure": {
            str(each["repetitions"]): each["median_exposure"]
            for each in report["canaries"]["by_repetition"]
        },
        "max_exposure": report["canaries"]["max_exposure"],
        "epsilon_lower": {each["unit"]: each["lower"] for each in report["epsilon"]},
    }


def _bars(runs: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    by_epsilon = {run["epsilon"]: run for run in runs}
    bars: dict[str, dict[str, Any]] = {}
    plain, private = by_epsilon.get("none"), by_epsilon.get("8")
    if options.overfit and plain:
        bars["auc_overfit"] = bar(max(plain["auc"].values()), ">=", 0.75)
        bars["extracted_16_overfit"] = bar(int(plain["extracted"]["16"].split("/")[0]), ">=", 1)
    if private:
        bars["auc_at_8"] = bar(max(private["auc"].values()), "<=", 0.55)
        extracted = sum(int(each.split("/")[0]) for each in private["extracted"].values())
        bars["extracted_at_8"] = bar(extracted, "<=", 0)
    if private and plain:
        kept = (private["base_loss"] - private["valid_loss"]) / (
            plain["base_loss"] - plain["valid_loss"]
        )
        bars["improvement_kept_at_8"] = bar(round(kept, 4), ">=", 0.6)
    return bars


def _tell(sentence: str) -> None:
    print(sentence, file=sys.stderr)


if __name__ == "__main__":
    main()
