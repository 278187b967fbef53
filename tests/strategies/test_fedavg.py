"""FedAvg against NumPy, on hand-made replies."""

from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.adapters import AdapterSchema, AdapterState, TensorSpec
from fedpeft.errors import AdapterError, ConfigError, FederationError, SchemaMismatch
from fedpeft.protocol import (
    ARRAYS,
    EVALUATE,
    METRICS,
    NUM_EXAMPLES,
    TRAIN,
    TRAIN_NLL,
    TRAIN_TOKENS,
    VALID_NLL,
    VALID_TOKENS,
    array_record,
    mean_loss,
    metric_record,
    state_of,
)
from fedpeft_strategies import FedAvg, build_strategy

pytestmark = pytest.mark.usefixtures("flower_identity")


def schema(fingerprint: str = "a") -> AdapterSchema:
    factors = TensorSpec("m.lora_A.weight", (2, 4)), TensorSpec("m.lora_B.weight", (3, 2))
    return AdapterSchema(factors, fingerprint * 64)


SCHEMA = schema()


def grid(*nodes: int) -> Any:
    """As much of Flower's grid as a strategy asks for."""
    return SimpleNamespace(get_node_ids=lambda: nodes)


def drawn(seed: int, of: AdapterSchema = SCHEMA) -> AdapterState:
    generator = torch.Generator().manual_seed(seed)
    return AdapterState(of, torch.randn(of.numel, generator=generator))


def reply(update: AdapterState, rows: float, nll: float = 1.0, tokens: float = 1.0) -> Message:
    metrics = metric_record({NUM_EXAMPLES: rows, TRAIN_NLL: nll, TRAIN_TOKENS: tokens})
    content = RecordDict({ARRAYS: array_record(update, "update"), METRICS: metrics})
    return Message(content, 0, TRAIN)


def configured(start: AdapterState) -> FedAvg:
    strategy = FedAvg(SCHEMA)
    strategy.configure_train(1, array_record(start, "adapter"), ConfigRecord(), grid(1))
    return strategy


def aggregated(start: AdapterState, replies: Sequence[Message]) -> torch.Tensor:
    arrays, _ = configured(start).aggregate_train(1, replies)
    assert arrays is not None
    return state_of(arrays, SCHEMA, "adapter", source="the strategy").values


def test_aggregating_before_configuring_is_refused():
    with pytest.raises(FederationError, match="configured before"):
        FedAvg(SCHEMA).aggregate_train(1, [])


def test_no_replies_make_no_adapter():
    assert configured(drawn(0)).aggregate_train(1, []) == (None, None)


def test_an_update_of_no_rows_is_refused():
    with pytest.raises(AdapterError, match="weight"):
        configured(drawn(0)).aggregate_train(1, [reply(drawn(1), 0)])


def test_an_update_for_another_base_model_is_refused():
    with pytest.raises(SchemaMismatch):
        configured(drawn(0)).aggregate_train(1, [reply(drawn(1, schema("b")), 5)])


def test_an_unknown_strategy_names_the_known_ones():
    with pytest.raises(ConfigError, match=r"'fedavgg' is unknown; the strategies are .*fedavg"):
        build_strategy("fedavgg", SCHEMA)


@given(weights=st.lists(st.integers(1, 10**6), min_size=1, max_size=6))
def test_the_next_adapter_is_the_last_plus_the_weighted_mean(weights: list[int]):
    start, updates = drawn(0), [drawn(seed + 1) for seed in range(len(weights))]
    values = np.stack([update.values.numpy() for update in updates]).astype(np.float64)
    expected = start.values.numpy() + np.average(values, axis=0, weights=weights)
    pairs = zip(updates, weights, strict=True)
    found = aggregated(start, [reply(update, weight) for update, weight in pairs])
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)


def test_the_order_of_the_replies_does_not_matter():
    replies = [reply(drawn(1), 800), reply(drawn(2), 100), reply(drawn(3), 100)]
    straight, reversed_ = aggregated(drawn(0), replies), aggregated(drawn(0), replies[::-1])
    torch.testing.assert_close(straight, reversed_, atol=1e-6, rtol=0)


def test_replies_are_folded_in_one_at_a_time():
    alive: list[int] = []

    def stream() -> Iterable[Message]:
        for seed in range(5):
            alive.append(seed)
            yield reply(drawn(seed + 1), 1)

    arrays, _ = configured(drawn(0)).aggregate_train(1, stream())
    assert arrays is not None
    assert alive == list(range(5))


def test_the_training_loss_is_weighted_by_tokens():
    replies = [reply(drawn(1), 1, nll=30, tokens=10), reply(drawn(2), 9, nll=90, tokens=90)]
    _, metrics = configured(drawn(0)).aggregate_train(1, replies)
    assert metrics is not None
    assert mean_loss(metrics, TRAIN_NLL, TRAIN_TOKENS) == pytest.approx(1.2)


def test_the_validation_loss_is_weighted_by_tokens():
    contents = [
        metric_record({VALID_NLL: n, VALID_TOKENS: t}) for n, t in ((30, 10), (90, 90), (0, 0))
    ]
    replies = [Message(RecordDict({METRICS: content}), 0, EVALUATE) for content in contents]
    metrics = FedAvg(SCHEMA).aggregate_evaluate(1, replies)
    assert metrics is not None
    assert mean_loss(metrics, VALID_NLL, VALID_TOKENS) == pytest.approx(1.2)


def test_without_validation_rows_there_is_no_loss():
    nothing = metric_record({VALID_NLL: 0.0, VALID_TOKENS: 0})
    replies = [Message(RecordDict({METRICS: nothing}), 0, EVALUATE)]
    assert FedAvg(SCHEMA).aggregate_evaluate(1, replies) is None
    assert FedAvg(SCHEMA).aggregate_evaluate(1, []) is None


@pytest.mark.parametrize("kind", [TRAIN, EVALUATE])
def test_everybody_is_asked_once_in_a_fixed_order(kind: str):
    strategy, state = build_strategy("fedavg", SCHEMA), drawn(0)
    ask = strategy.configure_train if kind == TRAIN else strategy.configure_evaluate
    messages = list(
        ask(1, array_record(state, "adapter"), ConfigRecord({"job": "x"}), grid(9, 3, 5))
    )
    assert [message.metadata.dst_node_id for message in messages] == [3, 5, 9]
    assert {message.metadata.message_type for message in messages} == {kind}
    for message in messages:
        arrays = message.content.array_records[ARRAYS]
        got = state_of(arrays, SCHEMA, "adapter", source="the server")
        assert torch.equal(got.values, state.values)
        assert message.content.config_records["config"] == {"job": "x"}
