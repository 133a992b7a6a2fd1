"""Zeroth-order estimates: random directions from seeds, where to measure the loss, and what the losses say.

The encoder (model/probing_encoder.py) and a device that trains by forwards alone share this. A direction is never stored or
sent: whoever knows (seed, step, query) and the tensors' names and shapes makes the same one. numpy only.

With q directions u_j the estimate of the gradient is  sum_j c_j u_j / q , c = `coefficients(...)`:

    forward     c_j = (L(w + eps u_j) - L(w)) / eps                  q + 1 losses
    central     c_j = (L(w + eps u_j) - L(w - eps u_j)) / (2 eps)    2 q losses
    one-point   c_j = L(w + eps u_j) / eps                           q losses; very noisy

Gaussian directions have E[u u^T] = I and need no factor. Directions on the unit sphere have E[u u^T] = I / d, so the
estimate is multiplied by d (arXiv 2403.16050's FedVZ leaves both open; MeZO, arXiv 2305.17333, is central, Gaussian,
q = 1). A sphere's eps is the length of the move itself, a Gaussian's is multiplied by about sqrt(d).
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fedsplit.core.encoder import Array, Directions, Estimator

Shapes = Mapping[str, tuple[int, ...]]


def points(estimator: Estimator, queries: int) -> tuple[tuple[int, float], ...]:
    """Where the K losses of a step are measured: (query, factor); the weights there are w + factor eps u_query."""
    if estimator == "forward":
        return ((0, 0.0), *((j, 1.0) for j in range(queries)))
    if estimator == "central":
        return tuple((j, sign) for j in range(queries) for sign in (1.0, -1.0))
    return tuple((j, 1.0) for j in range(queries))


def direction(
    seed: int, step: int, query: int, shapes: Shapes, kind: Directions = "gaussian"
) -> dict[str, Array]:
    """The direction of one query: name -> float32 array.

    Each tensor has a stream of its own, made of its name, so a Gaussian direction of a tensor does not depend on which
    other tensors there are. "sphere" divides by the norm over all of them.
    """
    found = {name: _normal(seed, step, query, name, shape) for name, shape in shapes.items()}
    if kind == "gaussian":
        return found
    # Sums are in the order of the names: whatever order the caller has, the norm is the same to the last bit.
    squares = (np.square(found[n], dtype=np.float64).sum() for n in sorted(found))
    norm = np.float32(np.sqrt(sum(squares)))
    return {name: value / norm for name, value in found.items()}


def dimension(shapes: Shapes) -> int:
    """d: how many numbers a direction over these tensors has."""
    return sum(int(np.prod(shape, dtype=np.int64)) for shape in shapes.values())


def coefficients(
    estimator: Estimator,
    losses_K: Array | Sequence[float],
    *,
    epsilon: float,
    dim: int,
    kind: Directions = "gaussian",
) -> NDArray[np.float64]:
    """One scalar a query: the estimate of the gradient is their sum over u_j, divided by their number.

    `losses_K` are in the order of `points`; `dim` is d, used by "sphere" alone.
    """
    # Differences of nearly equal losses: in float64, so that no digit is lost here.
    losses = np.asarray(losses_K, dtype=np.float64)
    if estimator == "forward":
        slopes = (losses[1:] - losses[0]) / epsilon
    elif estimator == "central":
        slopes = (losses[0::2] - losses[1::2]) / (2 * epsilon)
    else:
        slopes = losses / epsilon
    scalars_q: NDArray[np.float64] = slopes * dim if kind == "sphere" else slopes
    return scalars_q


def estimate(
    scalars_q: Sequence[float] | NDArray[np.float64],
    *,
    seed: int,
    step: int,
    shapes: Shapes,
    kind: Directions = "gaussian",
) -> dict[str, Array]:
    """The estimated gradient: the directions are made again, one at a time, and added up."""
    total = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    for query, scalar in enumerate(scalars_q):
        factor = np.float32(scalar / len(scalars_q))
        for name, value in direction(seed, step, query, shapes, kind).items():
            total[name] += factor * value
    return total


def _normal(seed: int, step: int, query: int, name: str, shape: tuple[int, ...]) -> Array:
    # Philox is counter-based: (seed, name) is its key, (query, step) the high words of its counter, so no two
    # streams meet before 2^64 draws.
    key = np.array([seed, zlib.crc32(name.encode())], dtype=np.uint64)
    counter = np.array([0, query, step, 0], dtype=np.uint64)
    generator = np.random.Generator(np.random.Philox(key=key, counter=counter))
    return generator.standard_normal(shape, dtype=np.float32)
