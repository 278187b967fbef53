"""The one training loop: a clinic's steps of one round, on its own rows.

Loss is the token mean over the answer tokens of the logical batch, whatever
the micro-batches, so gradient accumulation changes memory and not the result.
Errors and events carry counts and row numbers, never text.
"""

import contextlib
import math
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy

from fedpeft.config import TrainingSettings
from fedpeft.data import EncodedExample
from fedpeft.errors import AdapterUnchanged, NotFinite, TrainingError
from fedpeft.models import AdaptedModel
from fedpeft.training.batches import Place, derived_seed, plan_round
from fedpeft.training.collate import Batch, collate
from fedpeft.training.optimizer import build_optimizer
from fedpeft.training.schedule import learning_rate


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

    ``loss`` is the token-weighted mean over the steps, in nats per target token;
    ``tokens`` counts the tokens read, padding excluded.
    """

    steps: int
    loss: float
    target_tokens: int
    tokens: int
    seconds: float


Observer = Callable[[StepDone], None]


def train(
    model: AdaptedModel,
    examples: Sequence[EncodedExample],
    settings: TrainingSettings,
    place: Place,
    observe: Observer | None = None,
) -> TrainingResult:
    """Train the adapter in ``model`` in place for one round.

    Raises:
        TrainingError: there are no rows, or the optimiser does not fit the hardware.
        NotFinite: loss or gradient became NaN or infinite; names step and row numbers.
        AdapterUnchanged: no step changed the adapter, so there is nothing to send.
    """
    if not examples:
        raise TrainingError(f"clinic {place.clinic} has no rows to train on; add records")
    lengths = [len(example.input_ids) for example in examples]
    plan = plan_round(lengths, settings, place)
    optimizer = build_optimizer(model.weights, settings)
    start = model.weights.detach().clone()
    model.train_mode(gradient_checkpointing=settings.gradient_checkpointing)
    began, losses, target_tokens, tokens = time.perf_counter(), 0.0, 0, 0
    with _seeded_dropout(model, settings, place):
        for number, rows in enumerate(plan.batches):
            batch = [examples[row] for row in rows]
            loss, targets = _accumulate(model, batch, settings)
            norm = _constrain_gradient(model, start, settings)
            _require_finite(loss, norm, number + 1, batch, place)
            rate = learning_rate(settings, plan.first_step + number, plan.total_steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            losses += loss * targets
            target_tokens += targets
            tokens += sum(lengths[row] for row in rows)
            if observe is not None:
                speed = tokens / (time.perf_counter() - began)
                observe(StepDone(place, number + 1, len(plan.batches), loss, speed))
    if torch.equal(start, model.weights):
        raise AdapterUnchanged(
            f"clinic {place.clinic} trained {len(plan.batches)} steps in round {place.round} and "
            "the adapter did not change; check training.learning_rate and adapter.target_modules"
        )
    seconds = time.perf_counter() - began
    return TrainingResult(
        len(plan.batches), losses / max(1, target_tokens), target_tokens, tokens, seconds
    )


@contextlib.contextmanager
def _seeded_dropout(
    model: AdaptedModel, settings: TrainingSettings, place: Place
) -> Generator[None]:
    """Draw dropout from the seed of clinic and round, and leave torch's generators as they were."""
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        if model.settings.dropout:
            torch.manual_seed(derived_seed(settings.seed, "dropout", place.clinic, place.round))
        yield


def _accumulate(
    model: AdaptedModel, rows: Sequence[EncodedExample], settings: TrainingSettings
) -> tuple[float, int]:
    """Leave the gradient of the batch's mean loss in ``gradient``; return loss and targets."""
    size = settings.micro_batch_size or len(rows)
    parts = [collate(rows[at : at + size], model.device) for at in range(0, len(rows), size)]
    targets = sum(int(part.targets.sum()) for part in parts)
    model.gradient.zero_()
    loss = torch.zeros((), device=model.device)
    for part in parts:
        share = _summed_loss(model, part) / max(1, targets)
        share.backward()  # pyright: ignore[reportUnknownMemberType]
        loss += share.detach()
    return float(loss), targets


def _summed_loss(model: AdaptedModel, batch: Batch) -> torch.Tensor:
    logits = model.target_logits(batch.input_ids, batch.targets)
    return cross_entropy(logits.float(), batch.labels, reduction="sum")


def _constrain_gradient(
    model: AdaptedModel, start: torch.Tensor, settings: TrainingSettings
) -> torch.Tensor:
    """Add the proximal term, clip in place, and return the norm before clipping."""
    gradient = model.gradient
    if settings.proximal_mu:
        gradient.add_(model.weights.detach() - start, alpha=settings.proximal_mu)
    norm = torch.linalg.vector_norm(gradient)
    gradient.mul_(torch.clamp(settings.clip_norm / (norm + 1e-6), max=1.0))
    return norm


def _require_finite(
    loss: float, norm: torch.Tensor, step: int, rows: Sequence[EncodedExample], place: Place
) -> None:
    if math.isfinite(loss) and math.isfinite(float(norm)):
        return
    numbers = ", ".join(str(example.row) for example in rows)
    raise NotFinite(
        f"clinic {place.clinic}: the loss is {loss} and the gradient norm {float(norm)} at step "
        f"{step} of round {place.round} (rows {numbers}); lower training.learning_rate or look "
        "at those rows"
    )
