"""Server optimisers: the mean change of a round is a gradient that the server steps along.

FedAvgM (Hsu et al. 2019, arXiv:1909.06335); FedAdam, FedYogi and FedAdagrad (Reddi et al.
2021, arXiv:2003.00295). Each is laid around a strategy that says what is trained and
averages it; the step itself is computed by Flower's class of the same name, bit for bit.
A factor that has its own rounds is a problem of its own: it has its own moments and its
own count of steps. The step leaves the mean, so it is never exact.

Moments live in fixed coordinates, so the inner strategy may not turn the factors:
``alternating`` goes without its gauge here, ``ffa`` without ``reorthonormalize``.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import ClassVar, cast

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Metadata, MetricRecord, RecordDict
from flwr.app.message import make_message
from flwr.serverapp import strategy as flower
from numpy.typing import NDArray

from fedpeft.adapters import AdapterSchema, AdapterState, Factors
from fedpeft.config import StrategySettings
from fedpeft.errors import AdapterError, ConfigError
from fedpeft_strategies.alternating import Alternating
from fedpeft_strategies.declaration import Declaration
from fedpeft_strategies.fedavg import FedAvg
from fedpeft_strategies.ffa import Ffa
from fedpeft_strategies.strategy import Aggregated, Fold, Strategy
from fedpeft_strategies.wrapper import Wrapper

_INNER: Mapping[str, Callable[[AdapterSchema, StrategySettings], Strategy]] = MappingProxyType(
    {"fedavg": FedAvg, "ffa": Ffa, "alternating": partial(Alternating, gauge=False)}
)
_PART = "part"
"""The name, within Flower, of the one array that is optimised."""
_ADAPTIVE_RATE = 1e-2
_Flower = flower.FedAdam | flower.FedYogi | flower.FedAdagrad


@dataclass(frozen=True, kw_only=True, eq=False)
class _Moments:
    """What an optimiser knows after ``steps`` steps: float32 vectors of the part's length."""

    steps: int
    vectors: tuple[NDArray[np.float32], ...]


class Optimised(Wrapper):
    """The strategy ``strategy.inner`` with an optimiser's step in place of its mean.

    It holds the moments before and after the last round: a round that is finished once
    more starts from those before, and gives the same.

    Raises:
        ConfigError: ``strategy.inner`` is not one that it can be laid around.
    """

    around = _INNER
    vectors: ClassVar[tuple[str, ...]]
    """The names of the moments."""

    def __init__(self, schema: AdapterSchema, settings: StrategySettings) -> None:
        if settings.reorthonormalize:
            raise ConfigError(
                "strategy.reorthonormalize = true turns the factors each round, and the moments "
                f"of {self.declaration.name!r} would no longer fit them; set it to false"
            )
        super().__init__(schema, settings)
        self._moments: dict[Factors, _Moments] = {}
        self._earlier = self._moments
        self._finished = 0

    def fold(self, number: int, adapter: AdapterState) -> Fold:
        """Begin the inner strategy's round; the moments move when it ends."""
        inner = self._inner.fold(number, adapter)
        return _OptimisedFold(inner, partial(self._finish, number, adapter))

    def memory(self) -> dict[str, torch.Tensor]:
        """Return, for each part that was trained, its count of steps and its moments.

        Names are as ``B.steps`` (int64, shape (1,)) and ``B.first_moment`` (float32, shape
        (coordinates of the part,)).
        """
        kept: dict[str, torch.Tensor] = {}
        for factors, moments in self._moments.items():
            kept[f"{factors}.steps"] = torch.tensor([moments.steps])
            for name, vector in zip(self.vectors, moments.vectors, strict=True):
                kept[f"{factors}.{name}"] = torch.from_numpy(vector)
        return kept

    def recall(self, memory: Mapping[str, torch.Tensor]) -> None:
        """Go on with the steps and moments of an earlier :meth:`memory`.

        Raises:
            AdapterError: they are another strategy's or of another adapter.
        """
        moments: dict[Factors, _Moments] = {}
        names = ("steps", *self.vectors)
        for factors in dict.fromkeys((self.trains(1), self.trains(2))):
            found = [memory[key] for name in names if (key := f"{factors}.{name}") in memory]
            if found:
                moments[factors] = self._recalled(factors, found)
        if len(memory) != len(moments) * len(names):
            raise self._foreign()
        self._moments = self._earlier = moments
        self._finished = 0

    def _recalled(self, factors: Factors, found: list[torch.Tensor]) -> _Moments:
        length = self.schema.part(factors).numel
        shapes = [(1,), *((length,) for _ in self.vectors)]
        if [tuple(tensor.shape) for tensor in found] != shapes:
            raise self._foreign()
        vectors = tuple(tensor.float().numpy() for tensor in found[1:])
        return _Moments(steps=int(found[0]), vectors=vectors)

    def _foreign(self) -> AdapterError:
        return AdapterError(
            f"the moments that the run holds are not those of {self.declaration.name!r} for this "
            "adapter; start the run in another directory, or set strategy.name back"
        )

    def _finish(self, number: int, adapter: AdapterState, mean: AdapterState) -> Aggregated:
        """Return the adapter one step on from ``adapter``, towards the inner's ``mean``."""
        factors = self.trains(number)
        before = self._earlier if number == self._finished else self._moments
        part = adapter.part(factors)
        values, moments = self._step(
            before.get(factors) or self._none(part),
            part.values.float().numpy(),
            mean.part(factors).values.float().numpy(),
        )
        self._earlier, self._finished = before, number
        self._moments = dict(before)
        self._moments[factors] = moments
        stepped = torch.from_numpy(values).to(part.values.dtype)
        return Aggregated(adapter=adapter.with_part(AdapterState(part.schema, stepped)))

    def _none(self, part: AdapterState) -> _Moments:
        """Return what Flower's classes begin with."""
        zeros = np.zeros(part.schema.numel, dtype=np.float32)
        return _Moments(steps=0, vectors=(zeros,) * len(self.vectors))

    @abstractmethod
    def _step(
        self, past: _Moments, start: NDArray[np.float32], mean: NDArray[np.float32]
    ) -> tuple[NDArray[np.floating], _Moments]:
        """Return the next values (float32 or float64) and moments.

        ``start`` is where clinics began, ``mean`` where they are on the average.
        """


class _OptimisedFold(Fold):
    """The inner fold, with a step after it."""

    def __init__(self, inner: Fold, finish: Callable[[AdapterState], Aggregated]) -> None:
        self._inner, self._finish = inner, finish

    def add(self, change: AdapterState, weight: float) -> None:
        self._inner.add(change, weight)

    def result(self) -> Aggregated:
        return self._finish(self._inner.result().adapter)


def _declared(name: str, what: str, source: str) -> Declaration:
    return Declaration(
        name=name,
        what=what,
        source=source,
        exact="no",
        linear=True,
        up="as inner",
        down="as inner",
        mechanisms=frozenset({"local", "distributed", "central"}),
        wraps=tuple(_INNER),
    )


class FedAvgM(Optimised):
    """Momentum ``strategy.beta_1`` and rate ``strategy.server_learning_rate``, or 1 − beta_1.

    With that rate steady changes add up to themselves; with a rate of 1 they would be
    multiplied by 1 / (1 − beta_1), which an adapter that clinics train for many steps a round
    does not bear.
    """

    declaration = _declared(
        "fedavgm",
        "the inner strategy, its mean change a gradient for SGD with momentum, so not the mean",
        "Hsu et al. 2019, arXiv:1909.06335",
    )
    vectors = ("momentum",)

    def _step(
        self, past: _Moments, start: NDArray[np.float32], mean: NDArray[np.float32]
    ) -> tuple[NDArray[np.floating], _Moments]:
        optimiser = flower.FedAvgM(
            server_learning_rate=self.settings.server_learning_rate or 1 - self.settings.beta_1,
            server_momentum=self.settings.beta_1,
        )
        optimiser.current_arrays = ArrayRecord({_PART: Array(start)})
        optimiser.momentum_vector = list(past.vectors)
        steps = past.steps + 1
        values = _averaged(optimiser, steps, mean)
        return values, _Moments(steps=steps, vectors=tuple(optimiser.momentum_vector))


class _Adaptive(Optimised):
    """Flower's optimisers with a first and a second moment."""

    vectors = ("first_moment", "second_moment")

    @property
    def rate(self) -> float:
        """The learning rate at the server."""
        return self.settings.server_learning_rate or _ADAPTIVE_RATE

    @abstractmethod
    def _flower(self) -> _Flower:
        """Return Flower's optimiser, without a past."""

    def _step(
        self, past: _Moments, start: NDArray[np.float32], mean: NDArray[np.float32]
    ) -> tuple[NDArray[np.floating], _Moments]:
        optimiser = self._flower()
        optimiser.current_arrays = {_PART: start}
        optimiser.m_t, optimiser.v_t = ({_PART: vector} for vector in past.vectors)
        steps = past.steps + 1
        values = _averaged(optimiser, steps, mean)
        vectors = optimiser.m_t[_PART], optimiser.v_t[_PART]
        return values, _Moments(steps=steps, vectors=vectors)


class FedAdam(_Adaptive):
    """``strategy.beta_1``, ``beta_2``, ``tau``; rate ``server_learning_rate``, or 0.01.

    Flower corrects the bias of the first steps by 1 − β^(t + 1) in step t = 1, 2, ...
    """

    declaration = _declared(
        "fedadam",
        "the inner strategy, its mean change a gradient for Adam, so not the mean",
        "Reddi et al. 2021, arXiv:2003.00295",
    )

    def _flower(self) -> _Flower:
        own = self.settings
        return flower.FedAdam(eta=self.rate, beta_1=own.beta_1, beta_2=own.beta_2, tau=own.tau)


class FedYogi(_Adaptive):
    """``strategy.beta_1``, ``beta_2``, ``tau``; rate ``server_learning_rate``, or 0.01."""

    declaration = _declared(
        "fedyogi",
        "the inner strategy, its mean change a gradient for Yogi, so not the mean",
        "Reddi et al. 2021, arXiv:2003.00295",
    )

    def _flower(self) -> _Flower:
        own = self.settings
        return flower.FedYogi(eta=self.rate, beta_1=own.beta_1, beta_2=own.beta_2, tau=own.tau)


class FedAdagrad(_Adaptive):
    """``strategy.tau``; rate ``strategy.server_learning_rate``, or 0.01. It has no momentum."""

    declaration = _declared(
        "fedadagrad",
        "the inner strategy, its mean change a gradient for Adagrad, so not the mean",
        "Reddi et al. 2021, arXiv:2003.00295",
    )

    def _flower(self) -> _Flower:
        return flower.FedAdagrad(eta=self.rate, tau=self.settings.tau)


def _averaged(
    optimiser: flower.FedAvg, number: int, mean: NDArray[np.float32]
) -> NDArray[np.floating]:
    """Hand Flower's class the mean of a round as the answer of a single client.

    Of one client, Flower's own mean is what it sent (times 1.0). The message is made with
    its metadata, as ``Message(...)`` would stamp it with the process's task, and a strategy
    need not run inside one; nothing of them is read.
    """
    nowhere = Metadata(0, "", 0, 0, "", "", 0.0, 0.0, "train")
    metrics = MetricRecord({optimiser.weighted_by_key: 1.0})
    content = RecordDict({"arrays": ArrayRecord({_PART: Array(mean)}), "metrics": metrics})
    arrays, _ = optimiser.aggregate_train(number, [make_message(nowhere, content)])
    return cast(ArrayRecord, arrays)[_PART].numpy()  # None only for no answer at all
