"""What the training loop asks of whoever computes the gradients of its steps."""

import contextlib
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn.functional import cross_entropy

from fedpeft.models import AdaptedModel
from fedpeft.training.collate import Batch


@dataclass(frozen=True, slots=True)
class StepLoss:
    """What one step read.

    ``loss`` is in nats, a mean over ``terms`` terms: target tokens, or rows in a private
    step. ``tokens`` leaves padding out. ``unusable`` counts the units of privacy whose
    gradient was not finite.
    """

    loss: float
    terms: int
    target_tokens: int
    tokens: int
    unusable: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """What the first ``steps`` steps of a round read, added up in their order.

    ``loss`` is the sum of the steps' losses times their terms, ``seconds`` the time that
    they took, breaks between processes left out.
    """

    steps: int = 0
    loss: float = 0.0
    terms: int = 0
    target_tokens: int = 0
    tokens: int = 0
    unusable: int = 0
    seconds: float = 0.0

    def plus(self, step: StepLoss, seconds: float) -> "Totals":
        """Return what it is after one more step."""
        return Totals(
            steps=self.steps + 1,
            loss=self.loss + step.loss * step.terms,
            terms=self.terms + step.terms,
            target_tokens=self.target_tokens + step.target_tokens,
            tokens=self.tokens + step.tokens,
            unusable=self.unusable + step.unusable,
            seconds=self.seconds + seconds,
        )


class Steps(Protocol):
    """The steps of one round, each of which leaves its gradient in ``model.gradient``."""

    @property
    def count(self) -> int:
        """How many steps the round has, known before any of them."""
        ...

    @property
    def dropout_seed(self) -> int | None:
        """What torch's generators start the round from; None: from wherever they are."""
        ...

    def compute(self, step: int) -> StepLoss:
        """Leave the gradient of ``step`` (from 1) in ``model.gradient``, ready to be used."""
        ...

    def renew(self) -> dict[str, bytes]:
        """Draw from new secret keys from now on, and return them by name; empty: no secrets."""
        ...

    def go_on(self, keys: Mapping[str, bytes]) -> None:
        """Draw what was drawn after :meth:`renew` had returned ``keys``."""
        ...


def add_proximal_term(model: AdaptedModel, start: torch.Tensor, mu: float) -> None:
    """Add the gradient of mu/2 · |w − start|² (FedProx, arXiv:1812.06127)."""
    if mu:
        model.gradient.add_(model.weights.detach() - start, alpha=mu)


def summed_loss(model: AdaptedModel, batch: Batch) -> torch.Tensor:
    """Return the loss summed over the target tokens of ``batch``, a scalar in nats."""
    return _token_losses(model, batch, "sum")


def sequence_losses(model: AdaptedModel, batch: Batch) -> torch.Tensor:
    """Return each row's mean loss over its own target tokens: nats, float32, shape (rows,).

    Formal guarantee: entry i depends on row i alone, if the network computes rows
    independently. A mean over the batch's tokens would weigh row i by the others.
    """
    counts = batch.targets.sum(dim=1)
    row_of_term = batch.targets.nonzero()[:, 0]
    sums = torch.zeros(len(counts), device=counts.device)
    sums = sums.index_add(0, row_of_term, _token_losses(model, batch, "none"))
    return sums / counts.clamp(min=1)


def _token_losses(model: AdaptedModel, batch: Batch, reduction: str) -> torch.Tensor:
    logits = model.target_logits(batch.input_ids, batch.targets)
    return cross_entropy(logits.float(), batch.labels, reduction=reduction)


@contextlib.contextmanager
def seeded_dropout(model: AdaptedModel, seed: int | None) -> Generator[None]:
    """Draw dropout from ``seed``, and leave torch's generators as they were."""
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        if seed is not None:
            torch.manual_seed(seed)
        yield
