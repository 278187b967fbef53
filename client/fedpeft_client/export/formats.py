"""The formats that can be asked for, by name alone; imports no library."""

from enum import StrEnum


class Format(StrEnum):
    """What an export is written as."""

    peft = "peft"
    merged = "merged"
    gguf = "gguf"
    gguf_lora = "gguf-lora"
    onnx = "onnx"
