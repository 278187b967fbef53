"""fedpeft: clinics fine-tune one language model together without sharing a record.

Importing this package switches off every phone-home of the libraries below it
(see :mod:`fedpeft.offline`), so it must be imported before Flower or
transformers are. Every other package of the distribution does so first.
"""

from fedpeft import offline as _offline

_offline.enforce()

__version__ = "0.1.0"
__all__ = ["__version__"]
