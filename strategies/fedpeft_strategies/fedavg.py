"""FedAvg over the factors A and B (McMahan et al. 2017, arXiv:1602.05629; FedIT, arXiv:2305.05644).

The next adapter is the last one plus the mean of the clinics' changes, weighted
by their training rows. A and B are averaged separately, which is not the mean of
the products BA: the error is Σ p_i (B_i − B̄)(A_i − Ā).
"""

from collections.abc import Iterable

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedpeft.adapters import AdapterSchema, AdapterState, WeightedMean
from fedpeft.errors import FederationError
from fedpeft.protocol import (
    ARRAYS,
    CONFIG,
    EVALUATE,
    NUM_EXAMPLES,
    TRAIN,
    TRAIN_NLL,
    TRAIN_TOKENS,
    VALID_NLL,
    VALID_TOKENS,
    array_record,
    metric_from,
    metric_record,
    state_from,
)


class FedAvg(Strategy):
    """Weighted mean of the updates of all connected clinics, O(1) updates in memory."""

    name = "fedavg"

    def __init__(self, schema: AdapterSchema) -> None:
        self._schema = schema
        self._global: AdapterState | None = None

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask every connected clinic to train from the adapter in ``arrays``."""
        content = RecordDict({ARRAYS: arrays, CONFIG: config})
        self._global = state_from(content, self._schema, "adapter", source="the last round")
        return self._to_everyone(content, TRAIN, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Fold the replies in as they come; ``replies`` hold updates that were checked.

        Returns:
            The next adapter, and the summed training loss (nats) and target tokens.

        Raises:
            FederationError: called before :meth:`configure_train`.
        """
        if self._global is None:
            raise FederationError("a round must be configured before it is aggregated")
        mean, nll, tokens = WeightedMean(self._schema), 0.0, 0.0
        for reply in replies:
            update = state_from(reply.content, self._schema, "update", source="a clinic")
            mean.add(update, metric_from(reply.content, NUM_EXAMPLES))
            nll += metric_from(reply.content, TRAIN_NLL)
            tokens += metric_from(reply.content, TRAIN_TOKENS)
        if not mean.weight:
            return None, None
        arrays = array_record(self._global.plus(mean.result()), "adapter")
        return arrays, metric_record({"train-nll": nll, "train-tokens": tokens})

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send every connected clinic the adapter, to keep and to evaluate."""
        return self._to_everyone(RecordDict({ARRAYS: arrays, CONFIG: config}), EVALUATE, grid)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Sum validation loss (nats) and target tokens over the clinics."""
        contents = [reply.content for reply in replies]
        nll = sum(metric_from(content, VALID_NLL) for content in contents)
        tokens = sum(metric_from(content, VALID_TOKENS) for content in contents)
        return metric_record({"valid-nll": nll, "valid-tokens": tokens}) if tokens else None

    def summary(self) -> None:
        """Flower's hook for log lines; the run's own summary says it all."""

    def _to_everyone(self, content: RecordDict, kind: str, grid: Grid) -> list[Message]:
        return [Message(content, node, kind) for node in sorted(grid.get_node_ids())]
