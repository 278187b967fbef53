"""What an adapter gains on a clinic's rows, and what it loses of everyday English.

For each clinic and learning rate: one clinic alone trains rounds of the default recipe, and
after each the losses on its validation rows and on the general rows that ship with fedpeft
are compared with the base model's. ``acceptance.max_forgetting`` should lie between what
useful training costs and what ruins a model.

    python benchmarks/forgetting.py --model DIR --clinics DIR/cdc DIR/ninds DIR/mts-dialog

Each clinic's folder holds ``train.*`` and ``valid.*``.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from report import bar, emit

from fedpeft.offline import enforce

RATES = (2e-4, 1e-3, 5e-3, 2e-2)
STEPS, LENGTH, TRAIN_ROWS, VALID_ROWS = 20, 256, 300, 60


def main() -> None:
    """Measure, and print the figures."""
    options = _options()
    missing = [path for path in (options.model, *options.clinics) if not path.is_dir()]
    if missing:
        sys.exit(f"forgetting: {missing[0]} is no folder; name --model and --clinics")
    enforce()
    found = {
        folder.name: {f"{rate:g}": _measured(options, folder, rate) for rate in RATES}
        for folder in options.clinics
    }
    from fedpeft_client.settings import AcceptanceSettings

    allowed = AcceptanceSettings().max_forgetting
    usual, ruined = (f"{rate:g}" for rate in (RATES[0], RATES[-1]))
    emit(
        "forgetting",
        {"model": options.model.name, "rounds": options.rounds, "change": found},
        {
            "usual_training": bar(_last(found, usual, max), "<=", allowed),
            "ruined_model": bar(_last(found, ruined, min), ">=", allowed),
        },
    )


def _last(found: dict[str, Any], rate: str, choose: Any) -> float:
    return choose(rates[rate]["general"][-1] for rates in found.values())


def _measured(options: argparse.Namespace, folder: Path, rate: float) -> dict[str, list[float]]:
    """Return the change of both losses after each round, as parts of the base model's."""
    from fedpeft.config import AdapterSettings, TrainingSettings
    from fedpeft.data import encode, read_records
    from fedpeft.evaluation import score
    from fedpeft.models import Workbench, initial_state
    from fedpeft.training import Place, train
    from fedpeft_client.versions.examination import Examiner

    model = Workbench().adapted(
        options.model, AdapterSettings(), quantization="none", dtype="float32"
    )
    sets: dict[str, list[Any]] = {"general": Examiner().general(model.base)}
    for part, rows in (("train", TRAIN_ROWS), ("valid", VALID_ROWS)):
        records = read_records(next(folder.glob(f"{part}.*")))
        encoded = encode(records, model.base.tokenizer, max_length=LENGTH)
        sets[part] = list(encoded.examples[:rows])
    training = TrainingSettings(learning_rate=rate, local_steps=STEPS, max_length=LENGTH)
    model.load(initial_state(model.schema, 0))
    measured = ("valid", "general")
    base = {name: score(model, sets[name]).loss or 0.0 for name in measured}
    changes: dict[str, list[float]] = {name: [] for name in measured}
    for number in range(1, options.rounds + 1):
        train(model, sets["train"], training, Place(folder.name, number, options.rounds))
        for name in measured:
            loss = score(model, sets[name]).loss or 0.0
            changes[name].append(round(loss / base[name] - 1, 4))
    print(f"{folder.name}, learning rate {rate:g}: {changes}", file=sys.stderr)
    return changes


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="base model")
    parser.add_argument("--clinics", type=Path, nargs="+", required=True, help="clinics' folders")
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


if __name__ == "__main__":
    main()
