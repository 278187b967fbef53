"""A run on disk, and whether it is what was signed."""
