"""LoRA pairs as numbers: their names, products, truncation, padding and SVD. numpy only.

A pair is `<layer>.lora_A.weight` [r, in] and `<layer>.lora_B.weight` [out, r]; component n of it is row n of A
with column n of B. A pair of lower rank is a wider one whose last components are zero.

Shapes: o = out, i = in, r = the module's rank, s = a site's rank, k = all sites' ranks of a layer together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsplit.core.aggregation import Tensors, Update, moved

LORA_A = ".lora_A.weight"
LORA_B = ".lora_B.weight"
LORA_MERGED = ".lora_merged.weight"

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class Pair:
    """What one site made of one layer: its samples and the pair after training, in float64."""

    samples: int
    A_si: Doubles
    B_os: Doubles

    def norm(self) -> float:
        """Frobenius norm of B A, without forming the product."""
        squared = float(np.sum((self.B_os.T @ self.B_os) * (self.A_si @ self.A_si.T)))
        return math.sqrt(max(squared, 0.0))


def layers(module: Tensors) -> list[str]:
    """The names of the layers that have a pair in the module, in its order."""
    return [name.removesuffix(LORA_A) for name in module if name.endswith(LORA_A)]


def product(module: Tensors, layer: str, *, scale: float) -> Doubles:
    """What the module adds to the layer's weight [out, in]: scale * B A, and the merged matrix where there is one."""
    A_ri = module[layer + LORA_A].astype(np.float64)
    B_or = module[layer + LORA_B].astype(np.float64)
    product_oi: Doubles = scale * (B_or @ A_ri)
    if (merged := module.get(layer + LORA_MERGED)) is not None:
        product_oi += merged
    return product_oi


def is_pair(name: str) -> bool:
    """Is this an A or a B?"""
    return name.endswith((LORA_A, LORA_B))


def rank_of(name: str, value: Floats) -> int:
    """The number of components of an A or a B."""
    return int(value.shape[0 if name.endswith(LORA_A) else 1])


def first_components(name: str, value: Floats, rank: int) -> Floats:
    """An A or a B cut to `rank` components; any other tensor as it is."""
    if not is_pair(name) or rank_of(name, value) <= rank:
        return value
    return value[:rank] if name.endswith(LORA_A) else np.ascontiguousarray(value[:, :rank])


def later_norm(module: Tensors, rank: int) -> float:
    """Frobenius norm of what the components from `rank` on add, each layer's by itself, summed over the layers."""
    pairs = (
        Pair(
            0,
            module[layer + LORA_A][rank:].astype(np.float64),
            module[layer + LORA_B][:, rank:].astype(np.float64),
        )
        for layer in layers(module)
    )
    return sum(pair.norm() for pair in pairs)


def without_later(name: str, value: Floats, rank: int) -> Floats:
    """An A or a B with zeros for the components from `rank` on; any other tensor as it is."""
    if not is_pair(name):
        return value
    cut = value.copy()
    if name.endswith(LORA_A):
        cut[rank:] = 0
    else:
        cut[:, rank:] = 0
    return cut


def without_pairs(update: Update) -> Update:
    """The update's other tensors: classifier, prompt, adapter."""
    rest = {name: value for name, value in update.delta.items() if not is_pair(name)}
    return Update(site=update.site, samples=update.samples, delta=rest)


def pair_of(layer: str, update: Update, received: Tensors) -> Pair:
    """The site's pair after training: what it received, plus what it moved."""

    def trained(name: str) -> Doubles:
        value = received[name].astype(np.float64)
        return value + update.delta[name] if name in update.delta else value

    return Pair(update.samples, trained(layer + LORA_A), trained(layer + LORA_B))


def widened(name: str, value: Floats, received: Floats, delta: Floats) -> Floats:
    """The site's tensor, padded with zeros to the module's rank, as a delta from the module's tensor."""
    rank = rank_of(name, received)
    # The difference in brackets is zero, so a run of one rank averages as `aggregate` does, to the bit.
    held = delta + (received - first_components(name, value, rank))
    wide = -value
    if name.endswith(LORA_A):
        wide[:rank] = held
    else:
        wide[:, :rank] = held
    return wide


def moved_components(
    name: str, value: Floats, parts: Sequence[tuple[float, Floats]], held: int
) -> Floats:
    """`moved`, but the components from `held` on stay: no site of the round held them."""
    new = moved(value, parts)
    if name.endswith(LORA_A):
        new[held:] = value[held:]
    else:
        new[:, held:] = value[:, held:]
    return new


def stack(pairs: Sequence[Pair]) -> tuple[Doubles, Doubles]:
    """[w1 B1, w2 B2, ...] and [A1; A2; ...]: their product is the sample-weighted mean of the sites' B A."""
    total = sum(pair.samples for pair in pairs)
    left_ok = np.concatenate([pair.samples / total * pair.B_os for pair in pairs], axis=1)
    return left_ok, np.concatenate([pair.A_si for pair in pairs], axis=0)


def svd_of_product(left_ok: Doubles, right_ki: Doubles) -> tuple[Doubles, Doubles, Doubles]:
    """Singular values, left and right vectors of left @ right, largest first.

    Few sites on a wide layer go through the QR of both factors, so that the SVD is of k x k, not out x in.
    """
    if left_ok.shape[1] >= min(left_ok.shape[0], right_ki.shape[1]):
        u_ok, values_k, vt_ki = np.linalg.svd(left_ok @ right_ki, full_matrices=False)
        return values_k, u_ok, vt_ki
    q_left, r_left = np.linalg.qr(left_ok)
    q_right, r_right = np.linalg.qr(right_ki.T)
    u, values, vt = np.linalg.svd(r_left @ r_right.T, full_matrices=False)
    return values, q_left @ u, vt @ q_right.T
