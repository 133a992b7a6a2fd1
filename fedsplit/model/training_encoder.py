"""An encoder that trains by exact gradients: the module's tensors on blocks[a:b], stepped on the site's behalf.

Its sibling that trains by estimates is probing_encoder.py.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext

from torch import Tensor

from fedsplit.core.cut import Cut
from fedsplit.model.local_encoder import Graphs, LocalEncoder, Turn
from fedsplit.model.part import Part
from fedsplit.model.trained_tensors import Parameters, TrainedTensors, place, slots_of, trained_at
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
        self._slots = slots_of(part)
        self._forwards = threading.Lock()

    def close(self) -> None:
        """Free all held graphs and the tensors that they were made with."""
        super().close()
        self._turns.give(self)
        self._on_close()

    @contextmanager
    def _in_place(self, keep: bool) -> Iterator[Parameters]:
        """A forward whose gradient is wanted waits for this session's turn.

        Those before the first such one are of the version as it was published: a site tests what it received, however
        far others have moved a shared copy meanwhile.
        """
        if keep:
            self._turns.take(self)
            self._began = True
        with self._forwards:  # the twin holds one set of tensors at a time
            snapshot = self._tensors.snapshot() if self._began else self._tensors.start
            here = {n: snapshot[n] for n in self._here}
            place(self._slots, here)
            yield here

    def _learn(self, grads: Mapping[str, Tensor]) -> None:
        self._tensors.step(grads, weight=self._weight)
        if not self._kept:
            self._turns.give(self)

    def _measured(self, tokens: int) -> int:
        with self._forwards:
            place(self._slots, {n: self._tensors.snapshot()[n] for n in self._here})
            return super()._measured(tokens)
