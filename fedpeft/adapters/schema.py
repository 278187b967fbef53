"""The shape of an adapter, without its values: what both sides must agree on.

Knows nothing of torch modules, files or messages.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from fedpeft.errors import AdapterError, SchemaMismatch

Factors = Literal["A", "B", "AB"]
"""Which of the two low-rank factors of every module are meant."""


@dataclass(frozen=True, slots=True, order=True)
class TensorSpec:
    """One low-rank factor, named as PEFT's ``adapter_model.safetensors`` names it.

    ``lora_A`` has shape (rank, inputs), ``lora_B`` (outputs, rank).
    """

    name: str
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        if self.factor not in ("A", "B") or min(self.shape) < 1:
            raise AdapterError(
                f"tensor {self.name!r} of shape {self.shape} is not a LoRA factor; "
                "only plain LoRA adapters (lora_A and lora_B weights) can be federated"
            )

    @property
    def factor(self) -> str:
        """``"A"`` or ``"B"``; empty for anything else."""
        for factor in ("A", "B"):
            if self.name.endswith(f".lora_{factor}.weight"):
                return factor
        return ""

    @property
    def module(self) -> str:
        """The target module, e.g. ``base_model.model.model.layers.0.self_attn.q_proj``."""
        return self.name.rsplit(".lora_", 1)[0]

    @property
    def rank(self) -> int:
        """The rank r of the pair that this factor belongs to."""
        return self.shape[0] if self.factor == "A" else self.shape[1]

    @property
    def numel(self) -> int:
        """Count of coordinates."""
        return math.prod(self.shape)

    def of_rank(self, rank: int) -> "TensorSpec":
        """Return the factor of a pair of another rank between the same widths."""
        shape = (rank, self.shape[1]) if self.factor == "A" else (self.shape[0], rank)
        return replace(self, shape=shape)


@dataclass(frozen=True)
class AdapterSchema:
    """Names, shapes and dtype of all factors, and the base model that they belong to.

    ``tensors`` are sorted by name; ``dtype`` is a NumPy-style name and one for all;
    ``fingerprint`` is the base model's (SHA-256, hex).
    """

    tensors: tuple[TensorSpec, ...]
    fingerprint: str
    dtype: str = "float32"

    def __post_init__(self) -> None:
        names = [tensor.name for tensor in self.tensors]
        if not names or names != sorted(set(names)):
            raise AdapterError("an adapter schema needs distinct tensor names in sorted order")

    @property
    def numel(self) -> int:
        """Count of coordinates over all factors."""
        return sum(tensor.numel for tensor in self.tensors)

    @property
    def itemsize(self) -> int:
        """Bytes of one coordinate."""
        return 4 if self.dtype == "float32" else 2

    @property
    def rank(self) -> int:
        """The largest rank; all pairs of one adapter have the same."""
        return max(tensor.rank for tensor in self.tensors)

    @property
    def factors(self) -> Factors:
        """Which factors there are."""
        found = {tensor.factor for tensor in self.tensors}
        return "AB" if len(found) == 2 else "A" if found == {"A"} else "B"

    def part(self, factors: Factors, rank: int | None = None) -> "AdapterSchema":
        """Return the schema of some factors, cut to their first ``rank`` rows of A, columns of B.

        Raises:
            AdapterError: there is no such part.
        """
        rank = self.rank if rank is None else rank
        kept = [tensor for tensor in self.tensors if tensor.factor in factors]
        if not kept or not 1 <= rank <= self.rank:
            raise AdapterError(
                f"an adapter of factors {self.factors} and rank {self.rank} has no part of "
                f"factors {factors} and rank {rank}"
            )
        if len(kept) == len(self.tensors) and rank == self.rank:
            return self
        return self.of_rank(rank, kept)

    def of_rank(self, rank: int, tensors: Sequence[TensorSpec] | None = None) -> "AdapterSchema":
        """Return the schema with another rank; ``tensors`` are all of this one's by default."""
        chosen = self.tensors if tensors is None else tensors
        return replace(self, tensors=tuple(tensor.of_rank(rank) for tensor in chosen))

    @cached_property
    def hash(self) -> str:
        """SHA-256 (hex) of the canonical JSON of all fields; see docs/spec/adapter-wire.md."""
        content = {
            "dtype": self.dtype,
            "fingerprint": self.fingerprint,
            "tensors": [[tensor.name, *tensor.shape] for tensor in self.tensors],
        }
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def require(self, other_hash: str, *, source: str) -> None:
        """Check at a boundary that what ``source`` sent has this schema.

        Raises:
            SchemaMismatch: it has another.
        """
        if other_hash != self.hash:
            raise SchemaMismatch(
                f"the adapter from {source} has schema {other_hash[:12]} where "
                f"{self.hash[:12]} was agreed: its tensors, shapes, dtype or base model differ; "
                "compare the adapter settings and base models of both sides"
            )
