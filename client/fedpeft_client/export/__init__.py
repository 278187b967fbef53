"""The adapted model in the file formats of other tools, a module each.

Nothing here talks to the network or reads a record. This module imports nothing, so that
the command line can name the formats without loading torch.
"""
