"""An encoder that trains by estimates from losses, forwards alone (encoder-training=zeroth-order, FedVZ arXiv 2403.16050).

The directions and estimates are core/directions.py's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from itertools import count

import numpy as np
import torch
from torch import nn

from fedsplit.core import directions
from fedsplit.core.cut import Cut
from fedsplit.core.encoder import Array, Mask, Want
from fedsplit.core.errors import ProtocolError, RefusedError
from fedsplit.model.local_encoder import LocalEncoder, Turn
from fedsplit.model.part import Part
from fedsplit.model.trained_tensors import Parameters, TrainedTensors, place, slots_of


class ProbingEncoder(LocalEncoder):
    """A zeroth-order session: forwards of perturbed tensors, and steps by what their losses say. No backward, ever.

    A direction is (seed, number of the probe within the session, query), made anew when the losses come.
    """

    def __init__(
        self,
        part: Part,
        cut: Cut,
        tensors: TrainedTensors,
        *,
        on_close: Callable[[], None] = lambda: None,
        turn: Turn = nullcontext,
    ) -> None:
        """`part` is this session's own (`twin`)."""
        super().__init__(part, cut, turn=turn)
        self._on_close = on_close
        self._tensors = tensors
        self._training = tensors.training
        self._shapes = tensors.shapes
        self._numbers = count()
        self._probed: dict[int, int] = {}
        self._slots = slots_of(part)
        self._forwards = threading.Lock()

    def encode(
        self, step: int, h_BTD: Array, mask_BT: Mask | None = None, *, want: Want = "output"
    ) -> Array:
        """See core.encoder.Encoder. Raises RefusedError where a gradient is wanted."""
        if want == "gradient":
            raise RefusedError(f"step {step}: a zeroth-order session keeps no graph; probe it")
        if want == "probes":
            return self._probe(step, h_BTD, mask_BT)
        return super().encode(step, h_BTD, mask_BT)

    def settle(self, step: int, answer: Array, *, quiet: bool = False) -> None:
        """See core.encoder.Encoder. Raises ProtocolError for a step that was not probed or other than K losses."""
        del quiet  # there is no gradient that could come back
        training, losses_K = self._training, answer
        wanted = len(directions.points(training.estimator, training.queries))
        if losses_K.shape != (wanted,):
            raise ProtocolError(
                f"step {step} has losses of shape {losses_K.shape}: ({wanted},) is wanted"
            )
        with self._lock:
            number = self._probed.pop(step, None)
        if number is None:
            raise ProtocolError(f"step {step} was not probed, or its losses came before")
        scalars = directions.coefficients(
            training.estimator,
            losses_K,
            epsilon=training.epsilon,
            dim=directions.dimension(self._shapes),
            kind=training.directions,
        )
        estimate = directions.estimate(
            scalars, seed=training.seed, step=number, shapes=self._shapes, kind=training.directions
        )
        self._tensors.step({n: self._trunk.inward(g) for n, g in estimate.items()})

    def close(self) -> None:
        """Forget what was probed."""
        super().close()
        with self._lock:
            self._probed.clear()
        self._on_close()

    @contextmanager
    def _in_place(self, keep: bool) -> Iterator[Parameters]:
        del keep
        with self._forwards:
            place(self._slots, self._tensors.snapshot())
            yield {}

    def _probe(self, step: int, h_BTD: Array, mask_BT: Mask | None) -> Array:
        """Outputs of K perturbed encoders, [K, B, T, D] or [K, B, P]."""
        training, h = self._training, self._trunk.inward(h_BTD)
        outputs = []
        with self._forwards, self._turn(), torch.no_grad():
            number = next(self._numbers)
            snapshot, last, u = self._tensors.snapshot(), -1, dict[str, Array]()
            for query, factor in directions.points(training.estimator, training.queries):
                if factor and query != last:
                    last = query
                    u = self._direction(number, query)
                place(self._slots, _moved(snapshot, u, factor * training.epsilon))
                outputs.append(self._forward(h, mask_BT, self._cut.b))
            with self._lock:
                self._probed[step] = number
        return self._trunk.outward(torch.stack(outputs))

    def _direction(self, number: int, query: int) -> dict[str, Array]:
        training = self._training
        return directions.direction(training.seed, number, query, self._shapes, training.directions)


def _moved(weights: Parameters, u: Mapping[str, Array], length: float) -> Parameters:
    """Parameters moved along a direction; 0 leaves them as they are."""
    if not length:
        return weights
    return {
        n: nn.Parameter(p + length * torch.from_numpy(np.asarray(u[n])).to(p.device), False)
        for n, p in weights.items()
    }
