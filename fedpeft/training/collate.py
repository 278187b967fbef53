"""Rows of different lengths as one rectangle of tensors."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from fedpeft.data import EncodedExample


class Batch(NamedTuple):
    """``input_ids`` int64 and ``targets`` bool, both (rows, longest row), padded on the right.

    Padding is never a target, and position 0 neither: nothing comes before it.
    """

    input_ids: torch.Tensor
    targets: torch.Tensor

    @property
    def labels(self) -> torch.Tensor:
        """The target tokens in reading order, int64, shape (targets,)."""
        return self.input_ids[self.targets]


def collate(examples: Sequence[EncodedExample], device: torch.device) -> Batch:
    """Pad ``examples`` to the longest of them and move them to ``device``."""
    longest = max(len(example.input_ids) for example in examples)
    input_ids = torch.zeros((len(examples), longest), dtype=torch.int64)
    targets = torch.zeros((len(examples), longest), dtype=torch.bool)
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        input_ids[row, :length] = torch.from_numpy(example.input_ids)
        targets[row, :length] = torch.from_numpy(example.targets)
    targets[:, 0] = False
    return Batch(input_ids.to(device), targets.to(device))
