"""Steps without privacy: seeded batches, and one loss over all tokens of a batch.

Loss is the token mean over the answer tokens of the logical batch, whatever the
micro-batches, so gradient accumulation changes memory and not the result.
"""

import math
from collections.abc import Mapping, Sequence

import torch

from fedpeft.config import TrainingSettings
from fedpeft.data import EncodedExample
from fedpeft.errors import NotFinite
from fedpeft.models import AdaptedModel
from fedpeft.training.batches import Place, derived_seed, plan_round
from fedpeft.training.collate import collate
from fedpeft.training.steps import StepLoss, add_proximal_term, summed_loss


class PlainSteps:
    """The steps of ``place.round``; ``start`` holds the weights at its beginning."""

    def __init__(
        self,
        model: AdaptedModel,
        examples: Sequence[EncodedExample],
        settings: TrainingSettings,
        place: Place,
        start: torch.Tensor,
    ) -> None:
        self._model, self._settings, self._place = model, settings, place
        self._examples, self._start = examples, start
        self._batches = plan_round([len(row) for row in examples], settings, place).batches

    @property
    def count(self) -> int:
        """Steps of the round."""
        return len(self._batches)

    @property
    def dropout_seed(self) -> int | None:
        """A function of clinic and round, so that a round that is repeated gives the same."""
        if not self._model.settings.dropout:
            return None
        return derived_seed(self._settings.seed, "dropout", self._place.clinic, self._place.round)

    def compute(self, step: int) -> StepLoss:
        """Leave the clipped gradient of the batch's mean loss in ``model.gradient``.

        Raises:
            NotFinite: loss or gradient became NaN or infinite; names step and row numbers.
        """
        rows = [self._examples[row] for row in self._batches[step - 1]]
        loss, targets = self._accumulate(rows)
        norm = self._constrain_gradient()
        self._require_finite(loss, float(norm), step, rows)
        return StepLoss(loss, targets, targets, sum(len(row) for row in rows))

    def renew(self) -> dict[str, bytes]:
        """Return nothing: batches follow from seeds that are no secret."""
        return {}

    def go_on(self, keys: Mapping[str, bytes]) -> None:
        """Do nothing, for the same reason."""

    def _accumulate(self, rows: Sequence[EncodedExample]) -> tuple[float, int]:
        model = self._model
        size = self._settings.micro_batch_size or len(rows)
        parts = [collate(rows[at : at + size], model.device) for at in range(0, len(rows), size)]
        targets = sum(int(part.targets.sum()) for part in parts)
        model.gradient.zero_()
        loss = torch.zeros((), device=model.device)
        for part in parts:
            share = summed_loss(model, part) / max(1, targets)
            share.backward()  # pyright: ignore[reportUnknownMemberType]
            loss += share.detach()
        return float(loss), targets

    def _constrain_gradient(self) -> torch.Tensor:
        """Add the proximal term, clip in place, and return the norm before clipping."""
        gradient = self._model.gradient
        add_proximal_term(self._model, self._start, self._settings.proximal_mu)
        norm = torch.linalg.vector_norm(gradient)
        gradient.mul_(torch.clamp(self._settings.clip_norm / (norm + 1e-6), max=1.0))
        return norm

    def _require_finite(
        self, loss: float, norm: float, step: int, rows: Sequence[EncodedExample]
    ) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            return
        numbers = ", ".join(str(example.row) for example in rows)
        raise NotFinite(
            f"clinic {self._place.clinic}: the loss is {loss} and the gradient norm {norm} at "
            f"step {step} of round {self._place.round} (rows {numbers}); lower "
            "training.learning_rate or look at those rows"
        )
