"""The learning rate over the steps of a whole run."""

import math

from fedpeft.config.federation import TrainingSettings


def learning_rate(settings: TrainingSettings, step: int, total: int) -> float:
    """Return the rate of ``step`` (from 0) of ``total``: linear warm-up, then constant or cosine.

    The cosine ends at 0 (Loshchilov & Hutter 2017, arXiv:1608.03983, without restarts).
    """
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return settings.learning_rate
    done = (step - settings.warmup_steps) / max(1, total - settings.warmup_steps)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
