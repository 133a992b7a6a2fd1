"""Encoders that train: the module's tensors on blocks[a:b], stepped on the site's behalf. serving/host.py opens them.

`TrainedTensors` are the values, their optimiser and the snapshots that forwards run with; `TrainingEncoder` steps them by exact
gradients (hosted, shared), `ProbingEncoder` by estimates (zeroth-order, FedVZ arXiv 2403.16050). Frozen weights are shared
by all sessions and never written.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping
from itertools import count

import numpy as np
import torch
from torch import Tensor, nn

from fedsplit.core import directions
from fedsplit.core.cut import Cut
from fedsplit.core.encoder import Array, Mask, Training
from fedsplit.core.errors import EncoderError, ProtocolError, RefusedError
from fedsplit.model import module
from fedsplit.model.backbone import Part
from fedsplit.model.encoder import LocalEncoder
from fedsplit.model.seam import as_tensor
from fedsplit.model.turns import Turns

Weights = dict[str, nn.Parameter]
Slots = dict[str, tuple[nn.Module, str]]


def twin(part: Part) -> Part:
    """The same part with module objects of its own over the same tensors: 0.1 s, and next to no memory.

    A session that trains puts its own tensors into its twin, so sessions run at once without seeing each other's.
    """
    kept = (part.backbone, part.family, part.model.config)
    tensors = (*part.model.parameters(), *part.model.buffers())
    # What the memo names is not copied.
    copied = copy.deepcopy(part, {id(x): x for x in (*kept, *tensors)})
    copied.module_parameters = None
    return copied


def trained_at(part: Part, cut: Cut, lora: str = "both") -> Weights:
    """The module's tensors that a session at this cut trains: those on blocks[a:b], and on the pooling where b = L."""
    backbone = part.backbone
    last = backbone.blocks if cut.pooled(backbone.blocks) else cut.b - 1
    still = {"both": (), "A": (".lora_B.",), "B": (".lora_A.",)}[lora]
    return {
        name: parameter
        for name, parameter in module.parameters(part).items()
        if cut.a <= module.depth(backbone, name) <= last
        and module.trains(name)
        and not any(half in name for half in still)
    }


def _slots(part: Part) -> Slots:
    """name -> the module object and attribute that hold the module's tensor of that name."""
    owners = {
        id(parameter): (owner, leaf)
        for owner in part.model.modules()
        for leaf, parameter in owner.named_parameters(recurse=False)
    }
    return {name: owners[id(p)] for name, p in module.parameters(part).items()}


def _place(slots: Slots, weights: Mapping[str, nn.Parameter]) -> None:
    """Put other parameter objects into the slots of these names."""
    for name, value in weights.items():
        owner, leaf = slots[name]
        setattr(owner, leaf, value)


class TrainedTensors:
    """Some tensors in training: start, current values, optimiser. Safe to use from several sessions at once.

    The optimiser steps in place what no graph has seen; forwards get a snapshot, which is never written again, so a step's
    backward is with the weights of its own forward however many steps came between. Memory, in multiples of the tensors:
    values, one snapshot, AdamW's two moments and a gradient, and an older snapshot for each kept step.
    """

    def __init__(self, start: Mapping[str, nn.Parameter], training: Training) -> None:
        """`start` is kept, not copied, and never written: a published version does not change."""
        self.training = training
        self.steps = 0
        self.start = dict(start)
        self._values = {n: nn.Parameter(p.detach().clone()) for n, p in start.items()}
        self._snapshot: Weights | None = None
        self._stepped: set[str] = set()
        self._lock = threading.Lock()
        kind = torch.optim.AdamW if training.optimizer == "adamw" else torch.optim.SGD
        self._optimizer = kind(
            self._values.values(), lr=training.learning_rate, weight_decay=training.weight_decay
        )

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes."""
        return {n: tuple(p.shape) for n, p in self.start.items()}

    def snapshot(self) -> Weights:
        """The values of now, as leaves that a graph may hold."""
        with self._lock:
            if self._snapshot is None:
                self._snapshot = {
                    n: nn.Parameter(p.detach().clone()) for n, p in self._values.items()
                }
            return self._snapshot

    def step(self, grads: Mapping[str, Tensor], *, weight: float = 1.0) -> None:
        """One step of the optimiser on the tensors that have a gradient, with `weight` times the learning rate.

        Raises EncoderError, and changes nothing, when a gradient is not finite.
        """
        if bad := [n for n, g in grads.items() if not bool(torch.isfinite(g).all())]:
            raise EncoderError(
                f"the gradient of {bad[0]} at the encoder is not finite; nothing was trained with it. Lower the "
                f"learning rate (now {self.training.learning_rate:g}) or set clip-norm"
            )
        with self._lock:
            for name, parameter in self._values.items():
                parameter.grad = grads.get(name)
            if self.training.clip_norm:
                nn.utils.clip_grad_norm_(self._values.values(), self.training.clip_norm)
            for group in self._optimizer.param_groups:
                group["lr"] = self.training.learning_rate * weight
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
            self._snapshot = None
            self._stepped |= grads.keys()
            self.steps += 1

    def delta(self) -> dict[str, Array]:
        """What training has changed so far, as arrays of their own: of the tensors that a step has had."""
        with self._lock:
            return {n: (self._values[n] - self.start[n]).detach().numpy() for n in self._stepped}


class TrainingEncoder(LocalEncoder):
    """A session whose gradients step tensors at the encoder: its own (hosted), or all sessions' (shared).

    `weight` multiplies the learning rate of this session's steps. Shared: with weights n_i / sum n, one step of every
    site moves the tensors by  lr * sum_i (n_i / sum n) * step_i , which for SGD is  w <- w - lr * mean_i g_i  by samples;
    sessions take `turns`, so each gradient is that of the weights which it steps.
    """

    trains = True

    def __init__(
        self,
        part: Part,
        cut: Cut,
        tensors: TrainedTensors,
        *,
        weight: float = 1.0,
        turns: Turns | None = None,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        """`part` is this session's own (`twin`); `turns` those of all sessions on a shared copy."""
        super().__init__(part, cut)
        self._on_close = on_close
        self._tensors = tensors
        self._weight = weight
        self._turns = turns or Turns()
        self._began = False
        self._here = tuple(trained_at(part, cut, tensors.training.lora))
        self._weights: dict[int, Weights] = {}
        self._slots = _slots(part)
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
            _place(self._slots, weights)
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

    def _backward(self, step: int, dz: Array, *, wants_dh: bool) -> Tensor | None:
        h, z = self._take(step)
        weights = self._weights.pop(step)
        inputs = [*weights.values(), *([h] if wants_dh else [])]
        found = torch.autograd.grad(z, inputs, as_tensor(dz), allow_unused=True)
        grads = {n: g for n, g in zip(weights, found, strict=False) if g is not None}
        self._tensors.step(grads, weight=self._weight)
        if not self._weights:
            self._turns.give(self)
        return found[-1] if wants_dh else None


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
    ) -> None:
        """`part` is this session's own (`twin`)."""
        super().__init__(part, cut)
        self._on_close = on_close
        self._tensors = tensors
        self._training = tensors.training
        self._shapes = tensors.shapes
        self._numbers = count()
        self._probed: dict[int, int] = {}
        self._slots = _slots(part)
        self._forwards = threading.Lock()

    def encode(
        self, step: int, h_BTD: Array, mask_BT: Mask | None = None, *, keep: bool = False
    ) -> Array:
        """See core.encoder.Encoder. Raises RefusedError for `keep`."""
        if keep:
            raise RefusedError(f"step {step}: a zeroth-order session keeps no graph; probe it")
        with self._forwards:
            _place(self._slots, self._tensors.snapshot())
            return super().encode(step, h_BTD, mask_BT)

    def backprop(self, step: int, dz: Array) -> Array:
        """See core.encoder.Encoder. Raises RefusedError: no gradient crosses in either direction."""
        del dz
        raise RefusedError(f"step {step}: a zeroth-order session takes no gradient")

    def probe(self, step: int, h_BTD: Array, mask_BT: Mask | None = None) -> Array:
        """See core.encoder.Encoder."""
        training, h = self._training, as_tensor(h_BTD)
        outputs = []
        with self._forwards, torch.no_grad():
            number = next(self._numbers)
            snapshot, last, u = self._tensors.snapshot(), -1, dict[str, Array]()
            for query, factor in directions.points(training.estimator, training.queries):
                if factor and query != last:
                    last = query
                    u = self._direction(number, query)
                _place(self._slots, _moved(snapshot, u, factor * training.epsilon))
                outputs.append(self._forward(h, mask_BT))
            with self._lock:
                self._probed[step] = number
        return torch.stack(outputs).numpy()

    def score(self, step: int, losses_K: Array) -> None:
        """See core.encoder.Encoder. Raises ProtocolError for a step that was not probed or other than K losses."""
        training = self._training
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
        self._tensors.step({n: as_tensor(g) for n, g in estimate.items()})

    def close(self) -> None:
        """Forget what was probed."""
        super().close()
        with self._lock:
            self._probed.clear()
        self._on_close()

    def _direction(self, number: int, query: int) -> dict[str, Array]:
        training = self._training
        return directions.direction(training.seed, number, query, self._shapes, training.directions)


def _moved(weights: Weights, u: Mapping[str, Array], length: float) -> Weights:
    """Weights moved along a direction; 0 leaves them as they are."""
    if not length:
        return weights
    return {
        n: nn.Parameter(p + length * torch.from_numpy(np.asarray(u[n])), False)
        for n, p in weights.items()
    }
