"""The module's tensors in training at an encoder: which they are, their values, optimiser and snapshots.

Sessions put them into a twin of the part, so frozen weights are shared by all sessions and never
written.
"""

from __future__ import annotations

import copy
import math
import statistics
import threading
from collections import deque
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedsplit.core.cut import Cut
from fedsplit.core.encoder import Array, EncoderTraining
from fedsplit.core.errors import EncoderError
from fedsplit.model import module
from fedsplit.model.part import Part

Parameters = dict[str, nn.Parameter]
Slots = dict[str, tuple[nn.Module, str]]
MAX_RATIO = 1e4
"""So many times the median length of the last gradients may one be."""
SMALL_LENGTH = 1e-2
"""Below it lengths say little: training that is nearly done has tiny gradients, and still meets a hard batch."""
MAX_LENGTH = 1e6
"""Of the first gradients, which have none before them."""
_LENGTHS_NEEDED, _LENGTHS_KEPT = 8, 64


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


def trained_at(part: Part, cut: Cut, lora: str = "both") -> Parameters:
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


def slots_of(part: Part) -> Slots:
    """name -> the module object and attribute that hold the module's tensor of that name."""
    owners = {
        id(parameter): (owner, leaf)
        for owner in part.model.modules()
        for leaf, parameter in owner.named_parameters(recurse=False)
    }
    return {name: owners[id(p)] for name, p in module.parameters(part).items()}


def place(slots: Slots, weights: Mapping[str, nn.Parameter]) -> None:
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

    def __init__(self, start: Mapping[str, nn.Parameter], training: EncoderTraining) -> None:
        """`start` is kept, not copied, and never written: a published version does not change."""
        self.training = training
        self.steps = 0
        self.start = dict(start)
        self._values = {n: nn.Parameter(p.detach().clone()) for n, p in start.items()}
        self._snapshot: Parameters | None = None
        self._stepped: set[str] = set()
        self._lengths: deque[float] = deque(maxlen=_LENGTHS_KEPT)
        self._lock = threading.Lock()
        kind = torch.optim.AdamW if training.optimizer == "adamw" else torch.optim.SGD
        self._optimizer = kind(
            self._values.values(), lr=training.learning_rate, weight_decay=training.weight_decay
        )

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes."""
        return {n: tuple(p.shape) for n, p in self.start.items()}

    def snapshot(self) -> Parameters:
        """The values of now, as leaves that a graph may hold."""
        with self._lock:
            if self._snapshot is None:
                self._snapshot = {
                    n: nn.Parameter(p.detach().clone()) for n, p in self._values.items()
                }
            return self._snapshot

    def step(self, grads: Mapping[str, Tensor], *, weight: float = 1.0) -> None:
        """One step of the optimiser on the tensors that have a gradient, with `weight` times the learning rate.

        Raises EncoderError, and changes nothing, when a gradient is not finite, or so long that it would wreck the copy
        for everyone who trains it (`_check_length`).
        """
        if bad := [n for n, g in grads.items() if not bool(torch.isfinite(g).all())]:
            raise EncoderError(
                f"the gradient of {bad[0]} at the encoder is not finite; nothing was trained with it. Lower the "
                f"learning rate (now {self.training.learning_rate:g}) or set clip-norm"
            )
        # As a sum of float64, which a square of float32 cannot overflow.
        length = math.sqrt(sum(float(g.double().square().sum()) for g in grads.values()))
        with self._lock:
            self._check_length(length, weight)
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
            self._lengths.append(length)
            self.steps += 1

    def _check_length(self, length: float, weight: float) -> None:
        """Raise EncoderError for a gradient that is no honest one's size.

        By what it does: a step of SGD does not go farther than the values are long, and one. By what came before: with
        AdamW, whose steps have a length of their own, one huge gradient would stop all later ones.
        """
        training = self.training
        if training.mode != "shared" or training.clip_norm:
            return  # The copy is the site's own, or the gradient is cut to that length.
        if training.optimizer == "sgd":
            own = math.sqrt(
                sum(float(v.detach().double().square().sum()) for v in self._values.values())
            )
            most = (1 + own) / (training.learning_rate * weight)
        else:
            most = MAX_LENGTH
        if len(self._lengths) >= _LENGTHS_NEEDED:
            most = min(most, MAX_RATIO * max(statistics.median(self._lengths), SMALL_LENGTH))
        if length > most:
            raise EncoderError(
                f"the gradient of this step has length {length:.3g} over what trains at the encoder, at most {most:.3g} is "
                f"taken after those before it; nothing was trained with it. Lower the learning rate (now "
                f"{training.learning_rate:g}) or set clip-norm"
            )

    def delta(self) -> dict[str, Array]:
        """What training has changed so far, as arrays of their own: of the tensors that a step has had."""
        with self._lock:
            return {
                n: (self._values[n] - self.start[n]).detach().cpu().numpy() for n in self._stepped
            }
