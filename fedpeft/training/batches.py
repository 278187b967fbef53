"""Which rows make which batch, in every round of a run, as a function of seeds alone.

Works on row lengths; knows nothing of tokens or tensors. A clinic that
restarts in round 7 draws the batches that it would have drawn.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedpeft.config import TrainingSettings

_POOL_BATCHES = 50
"""Rows are sorted by length within pools of so many batches: little padding, still random."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where in a run a clinic stands; ``round`` counts from 1."""

    clinic: str
    round: int
    rounds: int


@dataclass(frozen=True, slots=True)
class Plan:
    """The batches (row indices) of one round, and its steps' place in the whole run."""

    batches: tuple[tuple[int, ...], ...]
    first_step: int
    total_steps: int


def plan_round(lengths: Sequence[int], settings: TrainingSettings, place: Place) -> Plan:
    """Return the batches of ``place.round``; together the rounds pass over the rows in epochs.

    ``lengths`` are tokens per row. Every epoch is a fresh permutation; its last
    batch may be smaller.
    """
    per_epoch = math.ceil(len(lengths) / settings.batch_size)
    steps = round_steps(len(lengths), settings)
    first = (place.round - 1) * steps
    batches: list[tuple[int, ...]] = []
    epoch: list[tuple[int, ...]] = []
    for step in range(first, first + steps):
        if not epoch or step % per_epoch == 0:
            epoch = _epoch(lengths, settings, place.clinic, step // per_epoch)
        batches.append(epoch[step % per_epoch])
    return Plan(tuple(batches), first, steps * place.rounds)


def round_steps(rows: int, settings: TrainingSettings) -> int:
    """Return how many optimiser steps a clinic with ``rows`` training rows makes in a round."""
    return settings.local_steps or math.ceil(rows / settings.batch_size) * (
        settings.local_epochs or 1
    )


def derived_seed(*parts: object) -> int:
    """Return a 63-bit seed that depends on every part (not for anything secret)."""
    text = "\0".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def _epoch(
    lengths: Sequence[int], settings: TrainingSettings, clinic: str, number: int
) -> list[tuple[int, ...]]:
    random = np.random.default_rng(derived_seed(settings.seed, "order", clinic, number))
    order = random.permutation(len(lengths))
    size = settings.batch_size
    if settings.bucket_by_length:
        pool = size * _POOL_BATCHES
        pools = [order[start : start + pool] for start in range(0, len(order), pool)]
        order = np.concatenate([_longest_first(rows, lengths) for rows in pools])
    batches = [tuple(map(int, order[start : start + size])) for start in range(0, len(order), size)]
    if settings.bucket_by_length:
        batches = [batches[index] for index in random.permutation(len(batches))]
    return batches


def _longest_first(rows: np.ndarray, lengths: Sequence[int]) -> np.ndarray:
    return rows[np.argsort([-lengths[row] for row in rows], kind="stable")]
