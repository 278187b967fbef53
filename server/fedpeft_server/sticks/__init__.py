"""Clinics without a network: their questions wait in a folder, and answers come as files."""
