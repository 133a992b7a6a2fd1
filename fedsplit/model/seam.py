"""The seam: one autograd function behind which the encoder, near or far, hides.

Petals' idea (remote blocks as an autograd function, arXiv 2209.01188): the training loop stays plain
PyTorch. What comes back through it depends on what needs a gradient:

    h needs none                            no graph is kept at the encoder, nothing goes up
    h was computed from what trains         dz goes up, dh comes down
    h is a leaf, the encoder trains         dz goes up and steps the encoder; no dh, for nobody would use it

So a caller whose head is frozen and whose encoder trains marks h: `cross(h.detach().requires_grad_(), ...)`. The mark is on
the tensor, not in the grad mode, because steps in flight run in threads with grad modes of their own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsplit.core.encoder import Array, Encoder, Mask


def as_tensor(array: Array | Mask) -> Tensor:
    """A tensor over the array's memory; read-only buffers are copied, as torch wants them writable."""
    return torch.from_numpy(np.require(array, requirements="W"))


def as_mask(mask_BT: Tensor | None) -> Mask | None:
    """The mask as a numpy array of booleans, None staying None."""
    return None if mask_BT is None else mask_BT.to(torch.bool).cpu().numpy()


class _Seam(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h_BTD: Tensor, mask: Mask | None, encoder: Encoder, step: int, wants_dh: bool
    ) -> Tensor:
        ctx.encoder, ctx.step, ctx.wants_dh = encoder, step, wants_dh
        return as_tensor(encoder.encode(step, h_BTD.detach().numpy(), mask, want="gradient"))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        dz = np.ascontiguousarray(grads[0].numpy())
        dh = ctx.encoder.settle(ctx.step, dz, quiet=not ctx.wants_dh)
        return None if dh is None else as_tensor(dh), None, None, None, None


def cross(h_BTD: Tensor, mask_BT: Tensor | None, encoder: Encoder, step: int) -> Tensor:
    """Send activations through the encoder: [B, T, D] -> [B, T, D] or [B, P]; differentiable in `h_BTD`."""
    h_BTD = h_BTD.contiguous()
    mask = as_mask(mask_BT)
    if h_BTD.requires_grad and torch.is_grad_enabled():
        # A frozen encoder has no use for a gradient of its own, so there a leaf's is handed on as well.
        wants_dh = not (h_BTD.is_leaf and encoder.trains)
        return _Seam.apply(h_BTD, mask, encoder, step, wants_dh)  # type: ignore[no-any-return,no-untyped-call]
    return as_tensor(encoder.encode(step, h_BTD.detach().numpy(), mask))


def probe(h_BTD: Tensor, mask_BT: Tensor | None, encoder: Encoder, step: int) -> Tensor:
    """Zeroth order: what K perturbed encoders make of the activations, [K, B, T, D] or [K, B, P]; no gradient."""
    h_BTD = h_BTD.detach().contiguous()
    return as_tensor(encoder.encode(step, h_BTD.numpy(), as_mask(mask_BT), want="probes"))


def settle(losses_K: Tensor, encoder: Encoder, step: int) -> None:
    """Zeroth order: tell the encoder the K losses of a probed step."""
    encoder.settle(step, losses_K.detach().to(torch.float32).numpy())
