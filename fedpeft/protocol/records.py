"""Jobs, adapters, updates and metrics as Flower records, and back.

The adapter is one raw blob in one array: Flower needs two requests per array.
"""

from collections.abc import Mapping
from typing import Literal, cast

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedpeft.adapters import AdapterSchema, AdapterState, from_bytes, to_bytes
from fedpeft.adapters.wire import Kind
from fedpeft.errors import AdapterError, ConfigError
from fedpeft.protocol.job import Job

TRAIN = "train"
EVALUATE = "evaluate"
KINDS = (TRAIN, EVALUATE)

ARRAYS, CONFIG, METRICS = "arrays", "config", "metrics"
_BLOB, _BLOB_TYPE, _JOB = "adapter", "fedpeft.adapter.v1", "job"

NUM_EXAMPLES = "num-examples"
"""Training rows of the clinic: its weight in the mean."""
TRAIN_NLL, TRAIN_TOKENS = "train-nll", "train-tokens"
VALID_NLL, VALID_TOKENS = "valid-nll", "valid-tokens"
Metric = Literal["num-examples", "train-nll", "train-tokens", "valid-nll", "valid-tokens"]


def array_record(state: AdapterState, kind: Kind) -> ArrayRecord:
    """Pack adapter values into the one array of a message."""
    data = to_bytes(state, kind)
    return ArrayRecord({_BLOB: Array("bytes", (len(data),), _BLOB_TYPE, data)})


def state_from(
    record: RecordDict, schema: AdapterSchema, kind: Kind, *, source: str
) -> AdapterState:
    """Read the adapter values of a message under the agreed schema.

    Raises:
        AdapterError: there is no such array.
        SchemaMismatch: it is of another schema, kind or length.
    """
    arrays = record.get(ARRAYS)
    if not isinstance(arrays, ArrayRecord):
        raise AdapterError(f"the message from {source} carries no adapter; it is not used")
    return state_of(arrays, schema, kind, source=source)


def state_of(
    arrays: ArrayRecord, schema: AdapterSchema, kind: Kind, *, source: str
) -> AdapterState:
    """Read what :func:`array_record` packed.

    Raises:
        AdapterError, SchemaMismatch: see :func:`state_from`.
    """
    array = arrays.get(_BLOB)
    if array is None or array.stype != _BLOB_TYPE:
        raise AdapterError(f"the message from {source} carries no adapter; it is not used")
    return from_bytes(array.data, schema, kind, source=source)


def blob_of(record: RecordDict) -> bytes | None:
    """Return the bytes that :func:`array_record` packed; None if there are none."""
    arrays = record.get(ARRAYS)
    array = arrays.get(_BLOB) if isinstance(arrays, ArrayRecord) else None
    return array.data if array is not None and array.stype == _BLOB_TYPE else None


def config_record(job: Job) -> ConfigRecord:
    """Pack the job of a message."""
    return ConfigRecord({_JOB: job.to_json()})


def job_from(record: RecordDict) -> Job:
    """Read the job of a message.

    Raises:
        ConfigError: there is none, or it is of another protocol version.
    """
    config = record.get(CONFIG)
    text = config.get(_JOB) if isinstance(config, ConfigRecord) else None
    if not isinstance(text, str):
        raise ConfigError("the server's message carries no job; install the same fedpeft release")
    return Job.from_json(text)


def metric_record(values: Mapping[Metric, int | float]) -> MetricRecord:
    """Pack the numbers that a clinic reports."""
    return MetricRecord({str(name): value for name, value in values.items()})


def mean_loss(metrics: MetricRecord, nll: Metric, tokens: Metric) -> float | None:
    """Return the loss in nats per token from its sums; None without tokens."""
    content = RecordDict({METRICS: metrics})
    count = metric_from(content, tokens)
    return metric_from(content, nll) / count if count else None


def metric_from(record: RecordDict, name: Metric) -> float:
    """Read one reported number.

    Raises:
        AdapterError: it is missing, negative or not finite.
    """
    metrics = record.get(METRICS)
    value = metrics.get(name) if isinstance(metrics, MetricRecord) else None
    if not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise AdapterError(f"the reply reports no usable {name}; it is not used")
    return float(cast("float", value))
