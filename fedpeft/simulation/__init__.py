"""Simulated federations: the same apps as on the real network, over three engines."""
