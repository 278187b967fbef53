"""Every strategy's next product, from its formula, in dense NumPy of double precision.

Shares no code with the package: an adapter is ``{module: (B, A)}`` of dense matrices, and
products are formed. Changes are of the same shape as the adapter they are added to.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
Pair = tuple[Matrix, Matrix]
Adapter = Mapping[str, Pair]


def product(adapter: Adapter) -> dict[str, Matrix]:
    """BA of every module, (outputs, inputs)."""
    return {module: np.einsum("dr,rk->dk", b, a) for module, (b, a) in adapter.items()}


def shares(weights: Sequence[float]) -> list[float]:
    return [weight / sum(weights) for weight in weights]


def moved(adapter: Adapter, change: Adapter) -> dict[str, Pair]:
    """The clinic's adapter; a change of a lower rank is of the first columns alone."""
    result: dict[str, Pair] = {}
    for module, (change_b, change_a) in change.items():
        (b, a), rank = adapter[module], len(change_a)
        result[module] = (b[:, :rank] + change_b, a[:rank] + change_a)
    return result


def mean_product(
    adapter: Adapter, changes: Sequence[Adapter], weights: Sequence[float]
) -> dict[str, Matrix]:
    """Σ p_i·B_i·A_i."""
    clinics = [product(moved(adapter, change)) for change in changes]
    return {
        module: sum(
            (p * clinic[module] for p, clinic in zip(shares(weights), clinics, strict=True)),
            start=np.zeros_like(clinics[0][module]),
        )
        for module in adapter
    }


def mean_change(
    changes: Sequence[Adapter], weights: Sequence[float], module: str
) -> tuple[Matrix, Matrix]:
    """The means of the changes of B and of A."""
    pairs = [change[module] for change in changes]
    return (
        np.average([b for b, _ in pairs], axis=0, weights=weights),
        np.average([a for _, a in pairs], axis=0, weights=weights),
    )


def product_of_means(
    adapter: Adapter, changes: Sequence[Adapter], weights: Sequence[float]
) -> dict[str, Matrix]:
    """B̄·Ā."""
    result: dict[str, Matrix] = {}
    for module, (b, a) in adapter.items():
        mean_b, mean_a = mean_change(changes, weights, module)
        result[module] = (b + mean_b) @ (a + mean_a)
    return result


def size(adapter: Adapter, changes: Sequence[Adapter], weights: Sequence[float]) -> float:
    """Σ p_i·‖B_i‖·‖A_i‖, the largest that the mean product could be."""
    total = 0.0
    for p, change in zip(shares(weights), changes, strict=True):
        pairs = moved(adapter, change).values()
        total += p * float(np.sqrt(sum(np.sum(b**2) * np.sum(a**2) for b, a in pairs)))
    return total


def best_of_rank(matrix: Matrix, rank: int) -> Matrix:
    left, values, right = np.linalg.svd(matrix)
    kept = min(rank, len(values))
    return left[:, :kept] @ np.diag(values[:kept]) @ right[:kept]


def nested_mean(changes: Sequence[Matrix], weights: Sequence[float], rank: int) -> Matrix:
    """The mean change of B (outputs, rank), each column among those who have it."""
    result = np.zeros((len(changes[0]), rank))
    for column in range(rank):
        having = [
            (change[:, column], weight)
            for change, weight in zip(changes, weights, strict=True)
            if column < change.shape[1]
        ]
        if having:
            whole = sum(weight for _, weight in having)
            result[:, column] = sum(weight * values for values, weight in having) / whole
    return result


def norm(matrices: Mapping[str, Matrix]) -> float:
    """Frobenius norm over all modules together."""
    return float(np.sqrt(sum(np.sum(matrix**2) for matrix in matrices.values())))


def distance(found: Mapping[str, Matrix], expected: Mapping[str, Matrix]) -> float:
    """‖found − expected‖ over all modules together."""
    return norm({module: found[module] - expected[module] for module in expected})
