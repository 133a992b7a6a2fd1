"""The real encoder: blocks[a:b] of a part, frozen, behind core's Encoder protocol.

`serving` opens one per session over shared weights; in-process use and the tests open it directly. Sessions that train
the module's tensors on the server's blocks are in training_encoder.py and probing_encoder.py and build on this.
"""

from __future__ import annotations

import threading

import numpy as np
import torch
from torch import Tensor

from fedsplit.core.cut import Cut
from fedsplit.core.encoder import Array, Mask
from fedsplit.core.errors import ProtocolError, RefusedError
from fedsplit.model.backbone import Part
from fedsplit.model.seam import as_tensor


class LocalEncoder:
    """One session: runs the blocks in this process and holds the graphs of kept steps until backprop."""

    trains = False

    def __init__(self, part: Part, cut: Cut) -> None:
        self._part = part
        self._cut = cut
        self._pooled = cut.pooled(part.backbone.blocks)
        # The block before which a forward that is kept stops.
        self._leave = cut.b
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
        with torch.set_grad_enabled(keep):
            h.requires_grad_(keep)
            z = self._forward(h, mask_BT, self._leave if keep else self._cut.b)
        if keep:
            self._keep(step, h, z)
        return z.detach().contiguous().numpy()

    def backprop(self, step: int, dz: Array) -> Array:
        """See core.encoder.Encoder. Raises ProtocolError for a step that is not held."""
        h, z = self._take(step)
        (dh,) = torch.autograd.grad(z, h, as_tensor(dz))
        return dh.contiguous().numpy()

    def learn(self, step: int, dz: Array) -> None:
        """See core.encoder.Encoder. Raises RefusedError: nothing trains here."""
        del dz
        raise RefusedError(f"step {step}: this session trains nothing at the encoder")

    def probe(self, step: int, h_BTD: Array, mask_BT: Mask | None = None) -> Array:
        """See core.encoder.Encoder. Raises RefusedError: that is for zeroth-order sessions."""
        del h_BTD, mask_BT
        raise RefusedError(f"step {step}: this session is not a zeroth-order one")

    def score(self, step: int, losses_K: Array) -> None:
        """See core.encoder.Encoder. Raises RefusedError: that is for zeroth-order sessions."""
        del losses_K
        raise RefusedError(f"step {step}: this session is not a zeroth-order one")

    def close(self) -> None:
        """Free all held graphs."""
        with self._lock:
            self._kept.clear()

    def _forward(self, h: Tensor, mask_BT: Mask | None, stop: int) -> Tensor:
        mask = None if mask_BT is None else torch.from_numpy(np.require(mask_BT, requirements="W"))
        z = self._part.run(h, mask, self._cut.a, stop)
        return self._part.pool(z) if self._pooled else z

    def _keep(self, step: int, h: Tensor, z: Tensor) -> None:
        with self._lock:
            self._kept[step] = (h, z)

    def _take(self, step: int) -> tuple[Tensor, Tensor]:
        with self._lock:
            held = self._kept.pop(step, None)
        if held is None:
            raise ProtocolError(
                f"step {step} is not held; its gradient was sent before or never asked for"
            )
        return held
