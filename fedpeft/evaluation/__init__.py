"""Evaluation of an adapter on records."""

from fedpeft.evaluation.scoring import Score, score, score_rows

__all__ = ["Score", "score", "score_rows"]
