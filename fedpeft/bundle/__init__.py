"""The offline bundle: one file that installs fedpeft on a machine without a network.

A bundle is a tar file of wheels, base model, configuration, systemd units, and the
installer that checks and installs them (``material/install.sh``). The same inputs give
the same bytes. Its SHA-256 sums are signed, so that a changed bundle is not installed.
"""

from fedpeft.bundle.checking import Findings, check_bundle
from fedpeft.bundle.making import Bundle, Ingredients, make_bundle
from fedpeft.bundle.wheels import WheelFolder

__all__ = ["Bundle", "Findings", "Ingredients", "WheelFolder", "check_bundle", "make_bundle"]
