"""Aggregation algorithms, one a file, behind Flower's ``Strategy`` hooks."""

import fedpeft as _fedpeft  # first: switches phone-home off before Flower is imported

__version__ = _fedpeft.__version__
