"""Measure, before records are touched, that a row's gradient depends on that row alone.

Everything that DP-SGD promises rests on it. What commonly breaks it: batch
normalisation, a loss that is averaged over the batch, a collator that mixes records.
"""

import weakref
from typing import cast

import numpy as np
import torch

from fedpeft.adapters import AdapterSchema, AdapterState
from fedpeft.data import EncodedExample
from fedpeft.errors import NotFinite, NotSeparable
from fedpeft.models import AdaptedModel
from fedpeft.privacy.per_unit import UnitGradients
from fedpeft.training.collate import collate
from fedpeft.training.steps import sequence_losses

_LENGTHS = (6, 11)
_TOLERANCES = {torch.float32: 1e-3, torch.float64: 1e-3}
_COARSE_TOLERANCE = 5e-2
"""Of bfloat16 and float16, whose rounding depends on the width of the padding."""

_WEIGHT_SCALE = 0.02
"""Of the random adapter to measure on. With B = 0, as at the start, A has no gradient."""

_measured: weakref.WeakKeyDictionary[AdaptedModel, set[AdapterSchema]] = weakref.WeakKeyDictionary()
"""What was measured on which model, by the schema of what it trained."""


def require_separable(model: AdaptedModel) -> None:
    """Compare two rows' gradients in one batch with those of each row alone.

    Done once for each part of an adapter that a model trains. The rows are made up, so
    that nothing can be learnt from the outcome. They differ in length and in their number
    of targets. Dropout is off; the adapter is left as it was.

    Raises:
        NotSeparable: the gradients differ, or a part of the model is known to mix rows.
        NotFinite: not even made-up rows have a finite gradient.
    """
    done = _measured.setdefault(model, set())
    if model.trained in done:
        return
    _refuse_batch_norm(model)
    kept = model.read()
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(model.schema.numel, generator=generator) * _WEIGHT_SCALE
    model.eval_mode()
    try:
        model.load(AdapterState(model.schema, values))
        _measure(model)
    finally:
        model.load(kept)
    done.add(model.trained)


def _refuse_batch_norm(model: AdaptedModel) -> None:
    from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

    for name, module in model.base.network.named_modules():
        if isinstance(module, _BatchNorm):
            raise NotSeparable(
                f"the base model normalises over the batch in {name} ({type(module).__name__}), "
                "which mixes records so that no clip bounds the effect of one; use a base model "
                "without batch normalisation, or train without [privacy]"
            )


def _measure(model: AdaptedModel) -> None:
    rows = _made_up_rows(model)
    model.gradient.zero_()
    together = _gradients(model, rows)
    alone = torch.cat([_gradients(model, [row]) for row in rows])
    if not torch.isfinite(together).all() or not torch.isfinite(alone).all():
        raise NotFinite(
            "the base model gives no finite gradients even on made-up rows; check its files, or "
            "compute in float32"
        )
    if model.gradient.any():
        raise NotSeparable(
            "a factor of the adapter is used other than by calling its module, so that its "
            "gradient cannot be told apart by record; train without [privacy]"
        )
    sizes = torch.linalg.vector_norm(alone, dim=1)
    apart = torch.linalg.vector_norm(together - alone, dim=1) / sizes
    tolerance = _TOLERANCES.get(model.base.network.dtype, _COARSE_TOLERANCE)
    # Not "any above": without a gradient, the quotient is NaN.
    if not bool((apart <= tolerance).all()):
        raise NotSeparable(
            "the gradient of a record depends on the other records of its batch (it changes by a "
            f"part of {float(apart.max()):.2g}, and {tolerance} is allowed), so no clip bounds the "
            "effect of one record; the base model, the loss or the collation mixes records: use "
            "another base model, or train without [privacy]"
        )


def _gradients(model: AdaptedModel, rows: list[EncodedExample]) -> torch.Tensor:
    gradients = UnitGradients(model, len(rows))
    batch = collate(rows, model.device)
    with gradients.listening(range(len(rows)), batch.input_ids.shape[1]):
        sequence_losses(model, batch).sum().backward()  # pyright: ignore[reportUnknownMemberType]
    return gradients.slots


def _made_up_rows(model: AdaptedModel) -> list[EncodedExample]:
    random = np.random.default_rng(0)
    words = len(cast("torch.nn.Embedding", model.base.network.get_input_embeddings()).weight)
    return [
        EncodedExample(
            random.integers(0, words, length).astype(np.int32),
            np.arange(length) >= length // 2,
            row=0,
            truncated=False,
            patient_id=None,
        )
        for length in _LENGTHS
    ]
