"""HetLoRA's pruning of a site's own rank (arXiv 2401.06432): what presses on the last components, and whether they go.

A pair is A [r, in] and B [out, r]; its last components are those from `kept` on.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedsplit.core.lora_pairs import LORA_A, LORA_B, later_norm, without_later
from fedsplit.model import module
from fedsplit.model.module import ModuleTensors
from fedsplit.model.part import Part


def kept_rank(share: float, rank: int) -> int:
    """How many components a site of `rank` keeps when it prunes: at least one."""
    return max(1, int(share * rank))


def press(parameters: Mapping[str, nn.Parameter], kept: int, weight: float) -> None:
    """Add the gradient of  weight * sum over layers of |B[:, kept:]| |A[kept:]|  to what the parameters have."""
    for name, a in parameters.items():
        if not name.endswith(LORA_A):
            continue
        b = parameters.get(name.removesuffix(LORA_A) + LORA_B)
        if b is None:
            continue
        later_a, later_b = a.detach()[kept:], b.detach()[:, kept:]
        length_a, length_b = later_a.norm(), later_b.norm()
        if a.grad is not None:
            a.grad[kept:] += weight * length_b * _direction(later_a, length_a)
        if b.grad is not None:
            b.grad[:, kept:] += weight * length_a * _direction(later_b, length_b)


def _direction(value: Tensor, length: Tensor) -> Tensor:
    """Of length 1, or zero where there is none."""
    return value / length if length > 0 else torch.zeros_like(value)


def prune(part: Part, start: ModuleTensors, *, rank: int, share: float) -> int:
    """The site's rank from now on. Where it falls, the components that go are zero in the part from here on.

    They go when training has made what they add smaller than it was at the `start` of the round.
    """
    kept = kept_rank(share, rank)
    if kept == rank:
        return rank
    now = module.read(part)
    if later_norm(now, kept) >= later_norm({n: start[n] for n in now}, kept):
        return rank
    module.load(part, {n: without_later(n, t, kept) for n, t in now.items()})
    return kept
