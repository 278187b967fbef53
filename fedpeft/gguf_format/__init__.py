"""GGUF, the file format of llama.cpp: base models and adapters written into it, and its header.

Must not know the engine that runs the files. What cannot be written is refused
(:class:`fedpeft.errors.NotConvertible`), so that the caller may let transformers run it.
"""

from fedpeft.gguf_format.adapter import write_adapter
from fedpeft.gguf_format.base import write_base
from fedpeft.gguf_format.header import Header, read_header
from fedpeft.gguf_format.mixture import Quantisation

__all__ = ["Header", "Quantisation", "read_header", "write_adapter", "write_base"]
