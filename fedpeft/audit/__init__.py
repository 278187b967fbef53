"""Proof by attack: what an adapter gives away of the records that it was trained on.

planting     draw canaries, hold patients out, write file and key
attack       score an adapter, and put the figures together
membership   ROC, AUC and true positives at few false ones
exposure     how much easier than chance a secret is to guess
one_run      a lower bound on epsilon from one training run
release      let an adapter out within limits, or keep it back
"""

from fedpeft.audit.attack import Attack, run_audit
from fedpeft.audit.keyfile import AuditKey, read_key
from fedpeft.audit.planting import Planted, Planting, plant
from fedpeft.audit.plot import draw
from fedpeft.audit.release import judge, release, require_release
from fedpeft.audit.report import AuditReport

__all__ = [
    "Attack",
    "AuditKey",
    "AuditReport",
    "Planted",
    "Planting",
    "draw",
    "judge",
    "plant",
    "read_key",
    "release",
    "require_release",
    "run_audit",
]
