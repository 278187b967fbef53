"""Local training: batches, schedule, optimiser and the loop."""

from fedpeft.training.batches import Place, Plan, plan_round, round_steps
from fedpeft.training.collate import Batch, collate
from fedpeft.training.loop import Observer, StepDone, TrainingResult, train
from fedpeft.training.schedule import learning_rate

__all__ = [
    "Batch",
    "Observer",
    "Place",
    "Plan",
    "StepDone",
    "TrainingResult",
    "collate",
    "learning_rate",
    "plan_round",
    "round_steps",
    "train",
]
