"""The values of an adapter: one flat vector under a schema, and its arithmetic.

One vector, not a tensor per factor: it is what is averaged, sent, masked and
clipped. The named factors are views into it.
"""

from dataclasses import dataclass

import torch

from fedpeft.adapters.schema import AdapterSchema, Factors, TensorSpec
from fedpeft.errors import AdapterError, NotFinite

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


@dataclass(frozen=True, eq=False)
class AdapterState:
    """Values of an adapter, or of a change to one.

    ``values`` has shape (schema.numel,), the schema's dtype, and lies on the CPU;
    factors follow each other in the schema's order, each row-major.
    """

    schema: AdapterSchema
    values: torch.Tensor

    def __post_init__(self) -> None:
        expected = (self.schema.numel,), DTYPES[self.schema.dtype]
        if (tuple(self.values.shape), self.values.dtype) != expected:
            raise AdapterError(
                f"adapter values of shape {tuple(self.values.shape)} and {self.values.dtype} "
                f"do not fit a schema of {expected[0]} and {expected[1]}"
            )

    @classmethod
    def from_tensors(
        cls, tensors: dict[str, torch.Tensor], schema: AdapterSchema
    ) -> "AdapterState":
        """Flatten named factors in the schema's order (a copy).

        Raises:
            SchemaMismatch: names or shapes differ from the schema.
        """
        found = schema_of(tensors, schema.fingerprint, schema.dtype)
        schema.require(found.hash, source="the tensors")
        dtype = DTYPES[schema.dtype]
        flat = [tensors[spec.name].detach().reshape(-1).to("cpu", dtype) for spec in schema.tensors]
        return cls(schema, torch.cat(flat))

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the named factors as views of shape ``spec.shape``."""
        parts = self.values.split([spec.numel for spec in self.schema.tensors])
        pairs = zip(self.schema.tensors, parts, strict=True)
        return {spec.name: part.view(spec.shape) for spec, part in pairs}

    def part(self, factors: Factors, rank: int | None = None) -> "AdapterState":
        """Return a copy of some factors' first ``rank`` rows of A, columns of B.

        Raises:
            AdapterError: there is no such part.
        """
        schema = self.schema.part(factors, rank)
        tensors = self.tensors()
        flat = [tensors[spec.name][_prefix(spec)].reshape(-1) for spec in schema.tensors]
        return AdapterState(schema, torch.cat(flat))

    def with_part(self, part: "AdapterState") -> "AdapterState":
        """Return a copy in which the coordinates of ``part`` (see :meth:`part`) are replaced.

        Raises:
            SchemaMismatch: ``part`` is not one of this adapter.
        """
        own = self.schema.part(part.schema.factors, min(part.schema.rank, self.schema.rank))
        own.require(part.schema.hash, source="the part")
        whole = AdapterState(self.schema, self.values.clone())
        tensors = whole.tensors()
        for spec, values in zip(part.schema.tensors, part.tensors().values(), strict=True):
            tensors[spec.name][_prefix(spec)] = values
        return whole

    def minus(self, other: "AdapterState") -> "AdapterState":
        """Return ``self - other``: the change that leads from ``other`` to ``self``."""
        self.schema.require(other.schema.hash, source="the subtrahend")
        return AdapterState(self.schema, self.values - other.values)

    def plus(self, change: "AdapterState") -> "AdapterState":
        """Return ``self + change``."""
        self.schema.require(change.schema.hash, source="the change")
        return AdapterState(self.schema, self.values + change.values)

    def norm(self) -> float:
        """Euclidean norm over all coordinates."""
        return float(torch.linalg.vector_norm(self.values, dtype=torch.float32))

    def require_finite(self, *, source: str) -> None:
        """Check that there is no NaN or infinity.

        Raises:
            NotFinite: says how many coordinates are not finite.
        """
        # The extremes carry every NaN and infinity, and need no mask as long as an adapter.
        low, high = torch.aminmax(self.values)
        if not torch.isfinite(low) or not torch.isfinite(high):
            bad = int((~torch.isfinite(self.values)).sum())
            raise NotFinite(
                f"the adapter from {source} has {bad} of {self.schema.numel} coordinates that are "
                "NaN or infinite; it is not used: lower training.learning_rate if it happens again"
            )


def _prefix(spec: TensorSpec) -> tuple[slice, slice]:
    """Return where a factor's first rows (A) or columns (B) lie in one of a higher rank."""
    return slice(spec.shape[0]), slice(spec.shape[1])


def schema_of(tensors: dict[str, torch.Tensor], fingerprint: str, dtype: str) -> AdapterSchema:
    """Describe named factors; ``dtype`` is the one to hold them in.

    Raises:
        AdapterError: a tensor is not a LoRA factor.
    """
    specs: list[TensorSpec] = []
    for name, tensor in sorted(tensors.items()):
        shape = tuple(tensor.shape)
        specs.append(TensorSpec(name, (shape[0], shape[1]) if len(shape) == 2 else (0, 0)))
    return AdapterSchema(tuple(specs), fingerprint, dtype)
