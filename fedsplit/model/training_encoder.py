"""An encoder that trains by exact gradients: the module's tensors on blocks[a:b], stepped on the site's behalf.

trunk/training.py opens its sessions. Its sibling that trains by estimates is probing_encoder.py.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from fedsplit.core.cut import Cut
from fedsplit.core.encoder import Array, Mask
from fedsplit.model.encoder import Graphs, LocalEncoder, Turn
from fedsplit.model.part import Part
from fedsplit.model.seam import as_tensor
from fedsplit.model.trained_tensors import TrainedTensors, Weights, place, slots_of, trained_at
from fedsplit.model.turns import Turns


class TrainingEncoder(LocalEncoder):
    """A session whose gradients step tensors at the encoder: its own (hosted), or all sessions' (shared).

    `weight` multiplies the learning rate of this session's steps. Shared: with weights n_i / sum n, one step of every
    site moves the tensors by  lr * sum_i (n_i / sum n) * step_i , which for SGD is  w <- w - lr * mean_i g_i  by samples;
    sessions take `turns`, so each gradient is that of the weights which it steps. With `leave` what is kept goes from that
    block to the pooling and trains no later one; tests go through all blocks (sampling of blocks: FeSViBS, arXiv 2306.14638).
    """

    trains = True

    def __init__(
        self,
        part: Part,
        cut: Cut,
        tensors: TrainedTensors,
        *,
        weight: float = 1.0,
        leave: int = 0,
        turns: Turns | None = None,
        on_close: Callable[[], None] = lambda: None,
        turn: Turn = nullcontext,
        graphs: Graphs | None = None,
    ) -> None:
        """`part` is this session's own (`twin`); `turns` those of all sessions on a shared copy; `leave` is within the cut."""
        super().__init__(part, cut, turn=turn, graphs=graphs)
        self._leave = leave or cut.b
        self._on_close = on_close
        self._tensors = tensors
        self._weight = weight
        self._turns = turns or Turns()
        self._began = False
        self._here = tuple(trained_at(part, cut, tensors.training.lora))
        self._weights: dict[int, Weights] = {}
        self._slots = slots_of(part)
        self._forwards = threading.Lock()

    def encode(
        self, step: int, h_BTD: Array, mask_BT: Mask | None = None, *, keep: bool = False
    ) -> Array:
        """See core.encoder.Encoder. A forward that is kept waits for this session's turn.

        Those before the first one that is kept are of the version as it was published: a site tests what it received, however
        far others have moved a shared copy meanwhile.
        """
        if keep:
            self._turns.take(self)
            self._began = True
        with self._forwards:  # the twin holds one set of weights at a time
            snapshot = self._tensors.snapshot() if self._began else self._tensors.start
            weights = {n: snapshot[n] for n in self._here}
            place(self._slots, weights)
            if keep:
                self._weights[step] = weights
            return super().encode(step, h_BTD, mask_BT, keep=keep)

    def backprop(self, step: int, dz: Array) -> Array:
        """See core.encoder.Encoder."""
        dh = self._backward(step, dz, wants_dh=True)
        assert dh is not None
        return dh.contiguous().numpy()

    def learn(self, step: int, dz: Array) -> None:
        """See core.encoder.Encoder."""
        self._backward(step, dz, wants_dh=False)

    def close(self) -> None:
        """Free all held graphs and the weights that they were made with."""
        super().close()
        self._weights.clear()
        self._turns.give(self)
        self._on_close()

    def _measured(self, tokens: int) -> int:
        with self._forwards:
            place(self._slots, {n: self._tensors.snapshot()[n] for n in self._here})
            return super()._measured(tokens)

    def _backward(self, step: int, dz: Array, *, wants_dh: bool) -> Tensor | None:
        h, z = self._take(step)
        weights = self._weights.pop(step)
        inputs = [*weights.values(), *([h] if wants_dh else [])]
        with self._turn():
            found = torch.autograd.grad(z, inputs, as_tensor(dz), allow_unused=True)
            grads = {n: g for n, g in zip(weights, found, strict=False) if g is not None}
            self._tensors.step(grads, weight=self._weight)
        if not self._weights:
            self._turns.give(self)
        return found[-1] if wants_dh else None
