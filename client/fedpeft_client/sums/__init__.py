"""A clinic's part in secure sums, and what of it outlives a kill."""
