"""Low-rank adapters: their schema, values, wire format and files."""

from fedpeft.adapters.lora import lora_config
from fedpeft.adapters.peft_directory import load_adapter, load_settings_of, save_adapter
from fedpeft.adapters.schema import AdapterSchema, TensorSpec
from fedpeft.adapters.state import DTYPES, AdapterState, WeightedMean, schema_of
from fedpeft.adapters.wire import from_bytes, to_bytes

__all__ = [
    "DTYPES",
    "AdapterSchema",
    "AdapterState",
    "TensorSpec",
    "WeightedMean",
    "from_bytes",
    "load_adapter",
    "load_settings_of",
    "lora_config",
    "save_adapter",
    "schema_of",
    "to_bytes",
]
