"""FedProx: a pull towards the round's start in each clinic's loss (arXiv:1812.06127).

The term, ``training.proximal_mu``/2 · ‖w − w_global‖², belongs to the clinics' training,
which adds it. At the server nothing is different: this is the inner strategy under the
name that says what the clinics do.
"""

from types import MappingProxyType

from fedpeft_strategies.alternating import Alternating
from fedpeft_strategies.declaration import Declaration
from fedpeft_strategies.fedavg import FedAvg
from fedpeft_strategies.ffa import Ffa
from fedpeft_strategies.wrapper import Wrapper


class FedProx(Wrapper):
    """The strategy ``strategy.inner``, with a proximal term at the clinics."""

    around = MappingProxyType({"fedavg": FedAvg, "alternating": Alternating, "ffa": Ffa})
    declaration = Declaration(
        name="fedprox",
        what="the inner strategy; clinics are held near the round's start, by training.proximal_mu",
        source="Li et al. 2020, arXiv:1812.06127",
        exact="no",
        linear=True,
        up="as inner",
        down="as inner",
        mechanisms=frozenset({"local", "distributed", "central"}),
        wraps=tuple(around),
    )
