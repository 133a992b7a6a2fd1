"""The real encoder: blocks[a:b] of a part, frozen, behind core's Encoder protocol.

`serving` opens one per session over shared weights; in-process use and the tests open it directly.
"""

from __future__ import annotations

import threading

import numpy as np
import torch
from torch import Tensor

from fedsplit.core.cut import Cut
from fedsplit.core.encoder import Array, Mask
from fedsplit.core.errors import ProtocolError
from fedsplit.model.backbone import Part
from fedsplit.model.seam import as_tensor


class LocalEncoder:
    """One session: runs the blocks in this process and holds the graphs of kept steps until backprop."""

    def __init__(self, part: Part, cut: Cut) -> None:
        self._part = part
        self._cut = cut
        self._pooled = cut.pooled(part.backbone.blocks)
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}
        self._lock = threading.Lock()

    @property
    def kept_steps(self) -> int:
        """Steps whose graph is held."""
        return len(self._kept)

    def encode(
        self, step: int, h_BTD: Array, mask_BT: Mask | None = None, *, keep: bool = False
    ) -> Array:
        """See core.encoder.Encoder."""
        h = as_tensor(h_BTD)
        mask = None if mask_BT is None else torch.from_numpy(np.require(mask_BT, requirements="W"))
        with torch.set_grad_enabled(keep):
            h.requires_grad_(keep)
            z = self._part.run(h, mask, self._cut.a, self._cut.b)
            if self._pooled:
                z = self._part.pool(z)
        if keep:
            with self._lock:
                self._kept[step] = (h, z)
        return z.detach().contiguous().numpy()

    def backprop(self, step: int, dz: Array) -> Array:
        """See core.encoder.Encoder. Raises ProtocolError for a step that is not held."""
        with self._lock:
            held = self._kept.pop(step, None)
        if held is None:
            raise ProtocolError(
                f"step {step} is not held; its gradient was sent before or never asked for"
            )
        h, z = held
        (dh,) = torch.autograd.grad(z, h, as_tensor(dz))
        return dh.contiguous().numpy()

    def close(self) -> None:
        """Free all held graphs."""
        with self._lock:
            self._kept.clear()
