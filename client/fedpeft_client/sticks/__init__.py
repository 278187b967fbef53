"""Rounds without a network: a box joins and answers by files on a stick."""
