"""Differential privacy: mechanisms, accounting and the ledger.

Import the modules by name: the accounting needs scipy and the gradients need torch,
and few callers need both.
"""
