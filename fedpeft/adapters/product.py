"""Sums and approximations of products BA, without ever forming one.

A product has outputs × inputs numbers, its factors rank times their sum. A sum of products
is one product whose factors stand beside each other, and of such a pair the best one of a
lower rank follows from two thin QR decompositions and the SVD of a small matrix. Knows
nothing of clinics or rounds.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from fedpeft.adapters.state import DTYPES, AdapterState
from fedpeft.errors import AdapterError


def pairs(state: AdapterState) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield every module's B (outputs, rank) and A (rank, inputs), as views.

    Raises:
        AdapterError: a factor is missing.
    """
    tensors = state.tensors()
    factors: dict[str, dict[str, torch.Tensor]] = {}
    for spec in state.schema.tensors:
        factors.setdefault(spec.module, {})[spec.factor] = tensors[spec.name]
    for module, found in factors.items():
        if len(found) < 2:
            raise AdapterError(
                f"module {module} has only factor {''.join(found)}, so it has no product BA; "
                "send both factors"
            )
        yield found["B"], found["A"]


def stacked(parts: Sequence[tuple[AdapterState, float]]) -> AdapterState:
    """Return the adapter whose product is Σ w_i·B_i·A_i; its rank is the sum of the ranks.

    B is [w_1·B_1, …, w_n·B_n] and A has the rows of A_1, …, A_n. The weights may be
    negative and the ranks may differ.

    Raises:
        AdapterError: there are no parts.
        SchemaMismatch: the parts differ in more than their rank.
    """
    if not parts:
        raise AdapterError("the sum of no products is undefined; give at least one")
    first = parts[0][0].schema
    for state, _ in parts:
        first.of_rank(1).require(state.schema.of_rank(1).hash, source="a part of the sum")
    schema = first.of_rank(sum(state.schema.rank for state, _ in parts))
    named = [(state.tensors(), weight) for state, weight in parts]
    flat: list[torch.Tensor] = []
    for spec in schema.tensors:
        if spec.factor == "A":
            whole = torch.cat([tensors[spec.name] for tensors, _ in named])
        else:
            whole = torch.cat([tensors[spec.name] * weight for tensors, weight in named], dim=1)
        flat.append(whole.reshape(-1))
    return AdapterState(schema, torch.cat(flat))


def truncated(state: AdapterState, rank: int) -> AdapterState:
    """Return the adapter of ``rank`` whose products BA are nearest to those of ``state``.

    Nearest in the Frobenius norm, module by module (Eckart and Young 1936): BA = UΣVᵀ is
    cut to its largest singular values, B = U√Σ and A = √ΣVᵀ, in descending order. So the
    first j columns are the best approximation of rank j. The largest entry of each column
    of B is positive. A rank beyond what there is is filled up with zeros. Computed in
    float64 in O((outputs + inputs)·R²) for R the rank of ``state``.

    Raises:
        AdapterError: ``rank`` is below 1, or a factor is missing.
    """
    if rank < 1:
        raise AdapterError(f"an adapter cannot be cut to rank {rank}; the least is 1")
    schema = state.schema.of_rank(rank)
    cut = AdapterState(schema, torch.zeros(schema.numel, dtype=DTYPES[schema.dtype]))
    for (b, a), (cut_b, cut_a) in zip(pairs(state), pairs(cut), strict=True):
        left, values, right = _svd(b, a)
        kept = min(rank, len(values))
        root = np.sqrt(values[:kept])
        cut_b[:, :kept] = torch.from_numpy(left[:, :kept] * root)
        cut_a[:kept] = torch.from_numpy(root[:, None] * right[:kept])
    return cut


def full_rank(state: AdapterState) -> int:
    """Return the rank beyond which no product BA of any module can have more.

    Raises:
        AdapterError: a factor is missing.
    """
    return max(min(b.shape[0], a.shape[1]) for b, a in pairs(state))


def product_norm(state: AdapterState) -> float:
    """Return the Frobenius norm of all products BA together.

    Computed in float64 to within about 10⁻⁸ of ‖B‖·‖A‖, which float32 factors do not reach.

    Raises:
        AdapterError: a factor is missing.
    """
    squares = 0.0
    for factor_b, factor_a in pairs(state):
        b, a = factor_b.double(), factor_a.double()
        # ‖BA‖² is the sum over all entries of BᵀB times those of AAᵀ; rounding may go below 0.
        squares += max(float(((b.T @ b) * (a @ a.T)).sum()), 0.0)
    return math.sqrt(squares)


def _svd(
    b: torch.Tensor, a: torch.Tensor
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return U, the singular values and Vᵀ of BA, with signs that are always the same."""
    basis_b, triangle_b = np.linalg.qr(b.double().numpy())
    basis_a, triangle_a = np.linalg.qr(a.T.double().numpy())
    left, values, right = np.linalg.svd(triangle_b @ triangle_a.T, full_matrices=False)
    left, right = basis_b @ left, right @ basis_a.T
    largest = np.take_along_axis(left, np.abs(left).argmax(axis=0)[None], axis=0)[0]
    signs = np.where(largest < 0, -1.0, 1.0)
    return left * signs, values, right * signs[:, None]
