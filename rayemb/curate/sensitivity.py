"""How much each row of a matrix matters to the norms of its products: leverage, Lewis weights. Knows no Ray.

Every quantity comes from Gram matrices `(D, D)`, which add up over shards, so that the matrix itself never has to be
in one place. All of it in float64.
"""

from collections.abc import Callable, Iterable
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]
Rows = NDArray[np.float32] | Doubles
Scheme = Literal["leverage", "root_leverage", "lewis", "uniform"]


def gram(rows_ND: Rows, weights_N: Doubles | None = None) -> Doubles:
    """`A^T diag(w) A` `(D, D)`; Gram matrices of shards add up to that of the whole."""
    a_ND = np.asarray(rows_ND, np.float64)
    product: Doubles = a_ND.T @ (a_ND if weights_N is None else a_ND * weights_N[:, None])
    return product


def pseudo_inverse(gram_DD: Doubles) -> Doubles:
    """The pseudo-inverse `(D, D)`: directions that no row has do not count."""
    values, vectors = np.linalg.eigh(gram_DD)
    # Rounding leaves eigenvalues of about D * eps * largest where there is nothing.
    real = values > len(values) * np.finfo(np.float64).eps * max(values[-1], 0.0)
    inverse: Doubles = (vectors[:, real] / values[real]) @ vectors[:, real].T
    return inverse


def leverage(rows_ND: Rows, inverse_DD: Doubles) -> Doubles:
    """`a_i^T G^+ a_i` `(N,)` in [0, 1] for G the Gram matrix of the whole; their sum over the whole is its rank."""
    a_ND = np.asarray(rows_ND, np.float64)
    # Not below 0 by rounding: roots are taken of it.
    values: Doubles = np.einsum("nd,de,ne->n", a_ND, inverse_DD, a_ND, optimize=True).clip(0, 1)
    return values


def lewis_inverse(p: float, reduce: Callable[[Callable[[Rows], Doubles]], Doubles], rounds: int) -> Doubles:
    """The matrix `M (D, D)` with l_p Lewis weights `(a_i^T M a_i)^(p/2)`, for 0 < p < 4 (Cohen and Peng, 2015).

    `reduce(f)` is the sum of `f(rows)` over the shards: one pass a round. p = 2 needs one round and gives leverage.
    """
    inverse = pseudo_inverse(reduce(gram))
    if p == 2:
        return inverse
    for _ in range(rounds):

        def weighted(rows_ND: Rows, inverse_DD: Doubles = inverse) -> Doubles:
            weights_N = lewis_weights(rows_ND, inverse_DD, p)
            # A row of weight 0 is a zero row: 0 ** (1 - 2/p) would be infinite for p < 2.
            powers_N = np.where(weights_N > 0, weights_N, 1) ** (1 - 2 / p)
            return gram(rows_ND, np.where(weights_N > 0, powers_N, 0))

        inverse = pseudo_inverse(reduce(weighted))
    return inverse


def lewis_weights(rows_ND: Rows, inverse_DD: Doubles, p: float) -> Doubles:
    """`(a_i^T M a_i)^(p/2)` `(N,)`: at the fixed point they lie in [0, 1] and sum to the rank."""
    a_ND = np.asarray(rows_ND, np.float64)
    quadratic = np.einsum("nd,de,ne->n", a_ND, inverse_DD, a_ND, optimize=True).clip(0)
    weights: Doubles = quadratic ** (p / 2)
    return weights


def importance(rows_ND: Rows, inverse_DD: Doubles, scheme: Scheme, p: float) -> Doubles:
    """What `scheme` samples in proportion to `(N,)`; `root_leverage`: leverage^(p/2), Lewis weights' cheap stand-in."""
    if scheme == "uniform":
        return np.ones(len(rows_ND))
    if scheme == "lewis":
        return lewis_weights(rows_ND, inverse_DD, p)
    values = leverage(rows_ND, inverse_DD)
    return values if scheme == "leverage" else values ** (p / 2)


def probabilities(importance_N: Doubles, total: float, budget: float) -> Doubles:
    """`min(1, budget * s_i / total)` `(N,)`: at most `budget` rows in expectation; 1 / it is a kept row's weight."""
    shares: Doubles = np.minimum(1.0, budget * importance_N / total) if total > 0 else np.zeros_like(importance_N)
    return shares


def weighted_norm(rows_ND: Rows, x_D: Doubles, p: float, weights_N: Doubles | None = None) -> float:
    """`||S A x||_p^p`: with the weights of kept rows its expectation is that of all rows."""
    powers = np.abs(np.asarray(rows_ND, np.float64) @ x_D) ** p
    return float((powers if weights_N is None else powers * weights_N).sum())


def summed(parts: Iterable[Doubles]) -> Doubles:
    """The sum of the shards' matrices."""
    total: Doubles = sum(parts)  # type: ignore[assignment]
    return total
