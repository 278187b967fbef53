"""A clinic's part in a round, from the opened question to the sealed answer."""
