"""How well an adapter predicts answers: loss, perplexity and exact match, in one pass.

Exact match needs no generation: greedy decoding yields exactly the reference
answer if and only if, at every answer token (the end-of-turn token included),
the reference token is the most likely one given the reference before it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy

from fedpeft.data import EncodedExample
from fedpeft.models import AdaptedModel
from fedpeft.training.collate import collate

_BATCH_TOKENS = 8192


@dataclass(frozen=True, slots=True)
class Score:
    """Sums over rows, so that scores of clinics add up to the score of all of them.

    ``nll`` is the summed negative log-likelihood in nats over ``tokens`` target
    tokens; ``exact`` of ``rows`` answers were matched exactly (a truncated row
    never is).
    """

    nll: float = 0.0
    tokens: int = 0
    exact: int = 0
    rows: int = 0

    def __add__(self, other: "Score") -> "Score":
        """Return the score over the rows of both."""
        return Score(
            self.nll + other.nll,
            self.tokens + other.tokens,
            self.exact + other.exact,
            self.rows + other.rows,
        )

    @property
    def loss(self) -> float | None:
        """Nats per target token; None without tokens."""
        return self.nll / self.tokens if self.tokens else None

    @property
    def perplexity(self) -> float | None:
        """exp(loss), infinity where that overflows; None without tokens."""
        if self.loss is None:
            return None
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def exact_match(self) -> float | None:
        """Share of rows answered exactly, 0 to 1; None without rows."""
        return self.exact / self.rows if self.rows else None


def score(model: AdaptedModel, examples: Sequence[EncodedExample]) -> Score:
    """Score the adapter in ``model`` on ``examples``."""
    model.eval_mode()
    total = Score()
    with torch.inference_mode():
        for rows in _batches(examples):
            total += _score_batch(model, rows)
    return total


def _score_batch(model: AdaptedModel, rows: Sequence[EncodedExample]) -> Score:
    batch = collate(rows, model.device)
    logits = model.target_logits(batch.input_ids, batch.targets).float()
    labels = batch.labels
    nll = cross_entropy(logits, labels, reduction="none").double()
    wrong = (logits.argmax(dim=-1) != labels).cpu()
    counts = batch.targets.sum(dim=1).tolist()
    misses = [int(part.sum()) for part in wrong.split(counts)]
    pairs = zip(rows, misses, strict=True)
    exact = sum(1 for row, missed in pairs if not missed and not row.truncated)
    return Score(float(nll.sum()), len(labels), exact, len(rows))


def _batches(examples: Sequence[EncodedExample]) -> list[list[EncodedExample]]:
    """Group rows of like length, about ``_BATCH_TOKENS`` tokens a group with padding."""
    batches: list[list[EncodedExample]] = []
    longest = 0
    for example in sorted(examples, key=lambda row: -len(row.input_ids)):
        if not batches or (len(batches[-1]) + 1) * longest > _BATCH_TOKENS:
            batches.append([])
            longest = len(example.input_ids)
        batches[-1].append(example)
    return batches
