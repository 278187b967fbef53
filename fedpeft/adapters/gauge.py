"""The choice of B and A among all pairs with the same product BA, and its change.

A pair (B, A) and (B·M, M⁻¹·A) are the same adapter. In the orthonormal gauge the factor
that will be trained next lies beside one whose columns (or rows) are orthonormal, so that
a change of the one is as long as the change of the product, in whatever direction.

A QR decomposition is not the same bit for bit on two machines, so one side computes it
and sends the small matrix R. A product with R is: it is written out here in additions and
multiplications of float64, in one order, which IEEE 754 fixes.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from fedpeft.adapters.schema import TensorSpec
from fedpeft.adapters.state import AdapterState
from fedpeft.errors import AdapterError


@dataclass(frozen=True, eq=False)
class Mixing:
    """For every module a matrix by which one factor is multiplied: A ← M·A, or B ← B·M.

    ``matrices`` is float64 (modules, rank, rank), in the order of the schema's modules.
    """

    factor: Literal["A", "B"]
    matrices: NDArray[np.float64]

    def applied(self, state: AdapterState) -> AdapterState:
        """Return ``state`` with the factor multiplied; the same bits on every machine.

        Raises:
            AdapterError: the matrices do not fit the adapter.
        """
        specs = _of(state, self.factor)
        if self.matrices.shape != (len(specs), state.schema.rank, state.schema.rank):
            raise AdapterError(
                f"matrices of shape {self.matrices.shape} do not fit an adapter of {len(specs)} "
                f"modules and rank {state.schema.rank}"
            )
        mixed = AdapterState(state.schema, state.values.clone())
        tensors = mixed.tensors()
        for spec, matrix in zip(specs, self.matrices, strict=True):
            tensor = tensors[spec.name]
            rows = _product(matrix if self.factor == "A" else matrix.T, _rows(tensor, spec))
            tensor.copy_(torch.from_numpy(rows if self.factor == "A" else rows.T))
        return mixed


def orthonormal(state: AdapterState, factor: Literal["A", "B"]) -> tuple[AdapterState, Mixing]:
    """Make a factor orthonormal by a thin QR decomposition; the product BA stays the same.

    For B: B = QR, B ← Q, A ← R·A. For A: Aᵀ = QR, A ← Qᵀ, B ← B·Rᵀ. R is upper
    triangular with a diagonal that is not negative, so the first j columns of the new
    factor span what the first j of the old one did. Columns beyond the width of a module,
    which add nothing to a product, become zero.

    Returns:
        The adapter in the new gauge, and the mixing that was applied to the *other* factor.
    """
    other: Literal["A", "B"] = "A" if factor == "B" else "B"
    changed = AdapterState(state.schema, state.values.clone())
    tensors, triangles = changed.tensors(), list[NDArray[np.float64]]()
    for spec in _of(state, factor):
        tensor = tensors[spec.name]
        basis, triangle = _basis(_rows(tensor, spec))
        tensor.copy_(torch.from_numpy(basis if factor == "A" else basis.T))
        triangles.append(triangle if factor == "B" else triangle.T)
    mixing = Mixing(other, np.stack(triangles))
    return mixing.applied(changed), mixing


def _of(state: AdapterState, factor: Literal["A", "B"]) -> list[TensorSpec]:
    return [spec for spec in state.schema.tensors if spec.factor == factor]


def _rows(tensor: torch.Tensor, spec: TensorSpec) -> NDArray[np.float64]:
    """Return a factor as its ``rank`` rows (of A) or columns (of B), float64."""
    values = tensor.double().numpy()
    return values if spec.factor == "A" else values.T


def _basis(rows: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return orthonormal rows and the triangle R (rank, rank) with ``rows`` = Rᵀ·basis."""
    q, r = np.linalg.qr(rows.T)
    signs = np.where(np.diagonal(r) < 0, -1.0, 1.0)
    basis, triangle = np.zeros_like(rows), np.zeros((len(rows), len(rows)))
    basis[: len(r)], triangle[: len(r)] = (q * signs).T, signs[:, None] * r
    return basis, triangle


def _product(matrix: NDArray[np.float64], rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return ``matrix @ rows`` summed column by column of ``matrix``, without a BLAS."""
    total = np.zeros((len(matrix), rows.shape[1]))
    for column, row in zip(matrix.T, rows, strict=True):
        total += column[:, None] * row[None, :]
    return total
