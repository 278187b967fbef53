"""Whether enough clinics are there for a round, have answered it, or could if asked again."""

import time
from typing import Final

from fedpeft.config import FederationSettings
from fedpeft.counts import counted
from fedpeft.errors import LASTING_REASONS, FederationError
from fedpeft.secagg.threshold import floor_of
from fedpeft_server.link.link import Link
from fedpeft_server.rounds.collection import Collected
from fedpeft_server.rounds.watcher import Watcher

_POLL_S: Final = 0.2


class Quorum:
    """How many clinics the rounds of a federation need."""

    def __init__(self, settings: FederationSettings, watcher: Watcher) -> None:
        self._rounds = settings.rounds
        self._aggregation = settings.aggregation
        self._watcher = watcher

    def gather(self, link: Link, number: int) -> None:
        """Wait for the minimum of clinics, and for a while for the other enrolled ones.

        Raises:
            FederationError: the minimum did not come in ``rounds.wait_s`` seconds.
        """
        rounds, began, told = self._rounds, time.monotonic(), -1
        while True:
            enrolled, connected = len(link.names()), len(list(link.grid.get_node_ids()))
            waited = time.monotonic() - began
            enough = connected >= rounds.minimum_clinics
            if enough and (connected >= enrolled or waited >= rounds.gather_s):
                return
            if not enough and waited >= rounds.wait_s:
                raise FederationError(
                    f"round {number} cannot start: {connected} of {enrolled} enrolled clinics are "
                    f"connected after {waited:.0f} s where rounds.minimum_clinics = "
                    f"{rounds.minimum_clinics}; start the missing clinics, then start again"
                )
            if connected != told:
                self._watcher.waiting(connected, enrolled, rounds.minimum_clinics)
                told = connected
            time.sleep(_POLL_S)

    def is_reached(self, collected: Collected) -> bool:
        """Say whether enough usable answers came."""
        return len(collected.participants) >= self._rounds.minimum_clinics

    def is_hopeless(self, link: Link, collected: Collected) -> bool:
        """Say whether too few clinics are left that could answer if they were asked again.

        Who is offline may come back, so all enrolled clinics count but those that refuse.
        """
        refusing = {name for name, why in collected.failed.items() if why in LASTING_REASONS}
        able, connected = set(link.names().values()) - refusing, list(link.grid.get_node_ids())
        needed = self._rounds.minimum_clinics
        if self._aggregation.confidentiality == "secagg":
            needed = max(needed, floor_of(len(connected), self._aggregation.adversary))
        return len(able) < needed

    def missing(self, collected: Collected) -> str:
        """Say why what came is not enough."""
        failed = ", ".join(f"{name}: {reason}" for name, reason in collected.failed.items())
        if collected.trouble:
            return f"{collected.trouble} ({failed or 'no clinic gave a reason'})"
        return (
            f"{counted(len(collected.participants), 'usable answer')} where rounds.minimum_clinics "
            f"= {self._rounds.minimum_clinics} ({failed or 'no other clinic is connected'})"
        )
