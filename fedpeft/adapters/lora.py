"""Our adapter settings as PEFT's ``LoraConfig``."""

from typing import TYPE_CHECKING

from fedpeft.config import AdapterSettings

if TYPE_CHECKING:
    from peft import LoraConfig


def lora_config(settings: AdapterSettings, base_name: str | None = None) -> "LoraConfig":
    """Return the stock configuration; ``base_name`` becomes ``base_model_name_or_path``."""
    from peft import LoraConfig  # takes seconds, and most commands need none

    target = settings.target_modules
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # pyright: ignore[reportArgumentType]  (PEFT accepts floats)
        lora_dropout=settings.dropout,
        target_modules=target if isinstance(target, str) else list(target),
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_name,
    )
