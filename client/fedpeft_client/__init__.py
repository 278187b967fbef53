"""What runs on a clinic box: training on private records, and the link to the server.

Must not import fedpeft_server or fedpeft_strategies.
"""

import fedpeft as _fedpeft  # first: switches phone-home off before Flower is imported

__version__ = _fedpeft.__version__
