"""What runs at the central site: enrolment, rounds and aggregation.

Must not import fedpeft_client, and never loads a base model.
"""

import fedpeft as _fedpeft  # first: switches phone-home off before Flower is imported

__version__ = _fedpeft.__version__
