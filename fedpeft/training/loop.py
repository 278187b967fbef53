"""The one training loop: a clinic's steps of one round, on its own rows.

It knows optimiser, schedule and progress; where a step's gradient comes from, with
privacy or without, is up to a :class:`fedpeft.training.steps.Steps`.
Errors and events carry counts and row numbers, never text.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fedpeft.config import TrainingSettings
from fedpeft.config.schedule import learning_rate
from fedpeft.data import EncodedExample
from fedpeft.errors import AdapterUnchanged, TrainingError
from fedpeft.models import AdaptedModel
from fedpeft.training.batches import Place
from fedpeft.training.checkpoint import Checkpoints, Standing
from fedpeft.training.optimizer import build_optimizer
from fedpeft.training.plain import PlainSteps
from fedpeft.training.private import PrivateRound, PrivateSteps
from fedpeft.training.steps import Steps, Totals, seeded_dropout


@dataclass(frozen=True, slots=True)
class StepDone:
    """One optimiser step: ``step`` of ``steps`` in this round, counted from 1."""

    place: Place
    step: int
    steps: int
    loss: float
    tokens_per_s: float


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """What a round of local training did.

    ``loss`` is the token-weighted mean over the steps, in nats per target token, and
    ``tokens`` counts the tokens read, padding excluded. Of a private round, ``loss`` is
    the mean over the sampled rows of their own means (0 if none was sampled), and
    ``unusable_units`` counts the gradients that were not finite and so counted as zero.

    No noise protects these figures: those of a private round must stay on this machine.
    """

    steps: int
    loss: float
    target_tokens: int
    tokens: int
    seconds: float
    unusable_units: int = 0


Observer = Callable[[StepDone], None]


def train(
    model: AdaptedModel,
    examples: Sequence[EncodedExample],
    settings: TrainingSettings,
    place: Place,
    observe: Observer | None = None,
    private: PrivateRound | None = None,
    checkpoints: Checkpoints | None = None,
) -> TrainingResult:
    """Train the adapter in ``model`` in place for one round, by DP-SGD if ``private``.

    With ``checkpoints`` it goes on where the round was stopped, and leaves on the CPU, bit
    for bit, what it would have left if it had not been.

    Raises:
        TrainingError: there are no rows, or the optimiser does not fit the hardware.
        NotFinite: loss or gradient became NaN or infinite; names step and row numbers.
        NotSeparable: no clip would bound a record's effect; ``private`` only.
        DataError: patients are to be protected and a record names none.
        AdapterUnchanged: no step changed the adapter, so there is nothing to send.
    """
    if not examples:
        raise TrainingError(f"clinic {place.clinic} has no rows to train on; add records")
    start = model.weights.detach().clone()
    if private is None:
        steps = PlainSteps(model, examples, settings, place, start)
    else:
        steps = PrivateSteps(model, examples, settings, private, start)
    model.train_mode(gradient_checkpointing=settings.gradient_checkpointing)
    with seeded_dropout(model, steps.dropout_seed):
        totals = _run(model, steps, settings, place, observe, checkpoints)
    if torch.equal(start, model.weights):
        raise AdapterUnchanged(
            f"clinic {place.clinic} trained {steps.count} steps in round {place.round} and "
            "the adapter did not change; check training.learning_rate and adapter.target_modules"
        )
    return TrainingResult(
        steps=totals.steps,
        loss=totals.loss / max(1, totals.terms),
        target_tokens=totals.target_tokens,
        tokens=totals.tokens,
        seconds=totals.seconds,
        unusable_units=totals.unusable,
    )


def _run(
    model: AdaptedModel,
    steps: Steps,
    settings: TrainingSettings,
    place: Place,
    observe: Observer | None,
    checkpoints: Checkpoints | None,
) -> Totals:
    """Take the steps that are left, and return what all of the round read."""
    optimizer = build_optimizer(model.weights, settings)
    standing = Standing(model, optimizer, steps)
    totals = begun = Totals() if checkpoints is None else standing.begin(checkpoints)
    first, total = (place.round - 1) * steps.count, place.rounds * steps.count
    for step in range(begun.steps + 1, steps.count + 1):
        began = time.perf_counter()
        read = steps.compute(step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, first + step - 1, total)
        optimizer.step()
        totals = totals.plus(read, time.perf_counter() - began)
        if checkpoints is not None:
            standing.offer(checkpoints, totals)
        if observe is not None:
            speed = (totals.tokens - begun.tokens) / (totals.seconds - begun.seconds)
            observe(StepDone(place, step, steps.count, read.loss, speed))
    return totals
