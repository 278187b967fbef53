"""Base models: where they lie, their identity, loading, and the adapter on top."""

from fedpeft.adapters.start import initial_state
from fedpeft.models.adapted import AdaptedModel
from fedpeft.models.base import BaseModel, load_base, load_tokenizer
from fedpeft.models.fingerprint import fingerprint, require_fingerprint
from fedpeft.models.hardware import choose_device, choose_dtype
from fedpeft.models.skeleton import adapter_schema
from fedpeft.models.source import context_length, require_complete, resolve_base
from fedpeft.models.workbench import Workbench

__all__ = [
    "AdaptedModel",
    "BaseModel",
    "Workbench",
    "adapter_schema",
    "choose_device",
    "choose_dtype",
    "context_length",
    "fingerprint",
    "initial_state",
    "load_base",
    "load_tokenizer",
    "require_complete",
    "require_fingerprint",
    "resolve_base",
]
