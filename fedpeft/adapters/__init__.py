"""Low-rank adapters: their schema, values, wire format and files."""

from fedpeft.adapters.combined import at_rank, combined
from fedpeft.adapters.gauge import Mixing, orthonormal
from fedpeft.adapters.lora import lora_config
from fedpeft.adapters.mean import WeightedMean
from fedpeft.adapters.peft_directory import load_adapter, load_settings_of, save_adapter
from fedpeft.adapters.product import full_rank, pairs, product_norm, stacked, truncated
from fedpeft.adapters.schema import AdapterSchema, Factors, TensorSpec
from fedpeft.adapters.start import initial_state
from fedpeft.adapters.state import DTYPES, AdapterState, schema_of
from fedpeft.adapters.wire import from_bytes, to_bytes

__all__ = [
    "DTYPES",
    "AdapterSchema",
    "AdapterState",
    "Factors",
    "Mixing",
    "TensorSpec",
    "WeightedMean",
    "at_rank",
    "combined",
    "from_bytes",
    "full_rank",
    "initial_state",
    "load_adapter",
    "load_settings_of",
    "lora_config",
    "orthonormal",
    "pairs",
    "product_norm",
    "save_adapter",
    "schema_of",
    "stacked",
    "to_bytes",
    "truncated",
]
