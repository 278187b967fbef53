"""Evaluation of an adapter on records."""

from fedpeft.evaluation.scoring import Score, score

__all__ = ["Score", "score"]
