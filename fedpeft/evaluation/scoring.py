"""How well an adapter predicts answers: loss, perplexity and exact match, in one pass.

Exact match needs no generation: greedy decoding yields exactly the reference
answer if and only if, at every answer token (the end-of-turn token included),
the reference token is the most likely one given the reference before it.
"""

import math
from collections.abc import Callable, Sequence
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
    return sum(score_rows(model, examples), Score())


def score_rows(
    model: AdaptedModel,
    examples: Sequence[EncodedExample],
    progress: Callable[[int], None] | None = None,
) -> list[Score]:
    """Score the adapter in ``model`` on each of ``examples``, in their order.

    ``progress`` is told after every batch how many rows are done.
    """
    model.eval_mode()
    scores = [Score()] * len(examples)
    done = 0
    with torch.inference_mode():
        for places in _batches(examples):
            found = _score_batch(model, [examples[place] for place in places])
            for place, one in zip(places, found, strict=True):
                scores[place] = one
            done += len(places)
            if progress is not None:
                progress(done)
    return scores


def _score_batch(model: AdaptedModel, rows: Sequence[EncodedExample]) -> list[Score]:
    batch = collate(rows, model.device)
    logits = model.target_logits(batch.input_ids, batch.targets).float()
    labels = batch.labels
    nll = cross_entropy(logits, labels, reduction="none").double().cpu()
    wrong = (logits.argmax(dim=-1) != labels).cpu()
    counts = batch.targets.sum(dim=1).tolist()
    parts = zip(rows, counts, nll.split(counts), wrong.split(counts), strict=True)
    return [
        Score(float(lost.sum()), count, int(not missed.any() and not row.truncated), 1)
        for row, count, lost, missed in parts
    ]


def _batches(examples: Sequence[EncodedExample]) -> list[list[int]]:
    """Group places of rows of like length, about ``_BATCH_TOKENS`` tokens a group with padding."""
    batches: list[list[int]] = []
    longest = 0
    for place in sorted(range(len(examples)), key=lambda at: -len(examples[at].input_ids)):
        if not batches or (len(batches[-1]) + 1) * longest > _BATCH_TOKENS:
            batches.append([])
            longest = len(examples[place].input_ids)
        batches[-1].append(place)
    return batches
