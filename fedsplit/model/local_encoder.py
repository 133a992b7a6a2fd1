"""An encoder in this process: blocks[a:b] of a part, frozen, behind core's Encoder protocol.

Two kinds of session build on it: training_encoder.py trains by exact gradients, probing_encoder.py
by estimates.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedsplit.core.cut import Cut
from fedsplit.core.encoder import Array, Mask, Want
from fedsplit.core.errors import ProtocolError, RefusedError
from fedsplit.model.part import Part
from fedsplit.model.trained_tensors import Parameters

Turn = Callable[[], AbstractContextManager[object]]
"""Held while a session computes."""
Graphs = dict[tuple[Cut, int, bool, int], int]
"""(cut, block to leave after, trains, tokens) -> bytes that the graph of one sample holds."""


class HeldStep(NamedTuple):
    """A step whose gradient is awaited: its graph goes from `h` and the tensors that train to `z`."""

    h: Tensor
    z: Tensor
    trained: Parameters


class LocalEncoder:
    """One session: runs the blocks in this process and holds the graphs of steps whose gradient is wanted."""

    trains = False

    def __init__(
        self, part: Part, cut: Cut, *, turn: Turn = nullcontext, graphs: Graphs | None = None
    ) -> None:
        """`turn` is held while this session computes; `graphs` keeps what was measured for other sessions like it."""
        self._part, self._trunk = part, part.trunk
        self._turn = turn
        self._graphs: Graphs = {} if graphs is None else graphs
        self._cut = cut
        self._pooled = cut.pooled(part.backbone.blocks)
        # The block before which a forward that is kept stops.
        self._leave = cut.b
        self._kept: dict[int, HeldStep] = {}
        self._lock = threading.Lock()

    @property
    def kept_steps(self) -> int:
        """Steps whose graph is held."""
        return len(self._kept)

    def encode(
        self, step: int, h_BTD: Array, mask_BT: Mask | None = None, *, want: Want = "output"
    ) -> Array:
        """See core.encoder.Encoder. Raises RefusedError for probes: those are a zeroth-order session's."""
        if want == "probes":
            raise RefusedError(f"step {step}: this session is not a zeroth-order one")
        keep, h = want == "gradient", self._trunk.inward(h_BTD)
        with self._in_place(keep) as trained:
            with self._turn(), torch.set_grad_enabled(keep):
                h.requires_grad_(keep)
                z = self._forward(h, mask_BT, self._leave if keep else self._cut.b)
            if keep:
                with self._lock:
                    self._kept[step] = HeldStep(h, z, trained)
        return self._trunk.outward(z)

    def settle(self, step: int, answer: Array, *, quiet: bool = False) -> Array | None:
        """See core.encoder.Encoder. Raises ProtocolError for a step that is not held."""
        if quiet and not self.trains:
            raise RefusedError(f"step {step}: this session trains nothing at the encoder")
        with self._lock:
            held = self._kept.pop(step, None)
        if held is None:
            raise ProtocolError(
                f"step {step} is not held; its gradient was sent before or never asked for"
            )
        inputs = [*held.trained.values(), *([] if quiet else [held.h])]
        with self._turn():
            found = torch.autograd.grad(
                held.z, inputs, self._trunk.inward(answer), allow_unused=True
            )
            self._learn({n: g for n, g in zip(held.trained, found, strict=False) if g is not None})
        return None if quiet else self._trunk.outward(found[-1])

    def graph_bytes(self, batch: int, tokens: int) -> int:
        """See core.encoder.HostedEncoder: a forward of one sample is measured, once for each number of tokens."""
        key = (self._cut, self._leave, self.trains, tokens)
        if key not in self._graphs:
            with self._turn():
                self._graphs[key] = self._measured(tokens)
        return batch * self._graphs[key]

    def _measured(self, tokens: int) -> int:
        """Bytes that autograd saves for one sample, weights apart: each storage once, however many views are saved."""
        weights = {
            p.untyped_storage().data_ptr() for p in self._part.model.parameters() if not p.is_meta
        }
        saved: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)  # else a freed place might be counted for two
            return tensor

        held: list[Tensor] = []
        width, device = self._part.backbone.width, self._trunk.device
        h = torch.zeros(1, tokens, width, requires_grad=True, device=device)
        # A text's mask is in the graph too, in every block; one that hides nothing would be left out.
        text = self._part.family.kind == "text" and tokens > 1
        mask = np.arange(tokens)[None] < tokens - 1 if text else None
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            z = self._forward(h, mask, self._leave)
        saved[h.untyped_storage().data_ptr()] = h.untyped_storage().nbytes()
        saved[z.untyped_storage().data_ptr()] = z.untyped_storage().nbytes()
        return sum(n for place, n in saved.items() if place not in weights)

    def close(self) -> None:
        """Free all held graphs."""
        with self._lock:
            self._kept.clear()

    def _forward(self, h: Tensor, mask_BT: Mask | None, stop: int) -> Tensor:
        mask = None if mask_BT is None else self._trunk.inward(mask_BT)
        z = self._trunk.run(h, mask, self._cut.a, stop)
        return self._part.ends.pool(z, mask) if self._pooled else z

    @contextmanager
    def _in_place(self, keep: bool) -> Iterator[Parameters]:
        """Held while a forward runs: what trains here, in its place; `keep`: its gradient is wanted."""
        del keep
        yield {}

    def _learn(self, grads: Mapping[str, Tensor]) -> None:
        """Step what trains here."""
