"""The seam: one autograd function behind which the encoder, near or far, hides.

Petals' idea (remote blocks as an autograd function, arXiv 2209.01188): the training loop stays plain
PyTorch. When nothing below the seam trains, no graph is kept at the encoder and no gradient comes back.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsplit.core.encoder import Array, Encoder, Mask


def as_tensor(array: Array) -> Tensor:
    """A tensor over the array's memory; read-only buffers are copied, as torch wants them writable."""
    return torch.from_numpy(np.require(array, requirements="W"))


def as_mask(mask_BT: Tensor | None) -> Mask | None:
    """The mask as a numpy array of booleans, None staying None."""
    return None if mask_BT is None else mask_BT.to(torch.bool).cpu().numpy()


class _Seam(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h_BTD: Tensor, mask: Mask | None, encoder: Encoder, step: int) -> Tensor:
        ctx.encoder, ctx.step = encoder, step
        return as_tensor(encoder.encode(step, h_BTD.detach().numpy(), mask, keep=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        dz = np.ascontiguousarray(grads[0].numpy())
        return as_tensor(ctx.encoder.backprop(ctx.step, dz)), None, None, None


def cross(h_BTD: Tensor, mask_BT: Tensor | None, encoder: Encoder, step: int) -> Tensor:
    """Send activations through the encoder: [B, T, D] -> [B, T, D] or [B, P]; differentiable in `h_BTD`."""
    h_BTD = h_BTD.contiguous()
    mask = as_mask(mask_BT)
    if h_BTD.requires_grad and torch.is_grad_enabled():
        return _Seam.apply(h_BTD, mask, encoder, step)  # type: ignore[no-any-return,no-untyped-call]
    return as_tensor(encoder.encode(step, h_BTD.detach().numpy(), mask, keep=False))
