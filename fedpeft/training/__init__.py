"""Local training: batches, schedule, optimiser, and the loop, with privacy or without."""

from fedpeft.config.schedule import learning_rate
from fedpeft.training.batches import Place, Plan, plan_round, round_steps
from fedpeft.training.checkpoint import Checkpoint, Checkpoints
from fedpeft.training.collate import Batch, collate
from fedpeft.training.loop import Observer, StepDone, TrainingResult, train
from fedpeft.training.private import (
    PrivateRound,
    PrivateSum,
    private_steps,
    private_sum,
    units_of,
)
from fedpeft.training.separable import require_separable
from fedpeft.training.steps import StepLoss

__all__ = [
    "Batch",
    "Checkpoint",
    "Checkpoints",
    "Observer",
    "Place",
    "Plan",
    "PrivateRound",
    "PrivateSum",
    "StepDone",
    "StepLoss",
    "TrainingResult",
    "collate",
    "learning_rate",
    "plan_round",
    "private_steps",
    "private_sum",
    "require_separable",
    "round_steps",
    "train",
    "units_of",
]
