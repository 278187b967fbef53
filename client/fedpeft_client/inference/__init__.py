"""Answers on this box, from the base model and the adapters of finished rounds."""
