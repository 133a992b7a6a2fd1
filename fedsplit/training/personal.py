"""Personal models beside the global one: Ditto and Fed-RoD.

Both take and return a site's own tensors as a flat dict of arrays; where they lie between rounds is the
caller's affair. The model is left as it was found. Shapes: B batch, F features, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fedsplit.core.errors import UpdateError
from fedsplit.model import module
from fedsplit.model.module import ModuleTensors
from fedsplit.model.part import Part
from fedsplit.model.split import SplitModel
from fedsplit.training.activation_cache import CacheView
from fedsplit.training.last_linear import LastInput, last_linear
from fedsplit.training.losses import softmax
from fedsplit.training.meter import WaitMeter
from fedsplit.training.optimise import Arrays, optimizer, trained
from fedsplit.training.round import Batches, train
from fedsplit.training.settings import TrainSettings

ROD_WEIGHT, ROD_BIAS = "personal.weight", "personal.bias"


@dataclass(frozen=True)
class PersonalState:
    """What a site keeps for itself after a round."""

    tensors: ModuleTensors
    loss: float
    """Mean loss of the personal model over the round's samples."""


@contextmanager
def holding(part: Part, tensors: Arrays) -> Iterator[None]:
    """Within, the part holds these values where it has such tensors, e.g. a personal copy's; afterwards its own again."""
    own = module.read(part)
    try:
        module.load(part, own | {n: t for n, t in tensors.items() if n in own})
        yield
    finally:
        module.load(part, own)


def train_ditto(
    model: SplitModel,
    batches: Batches,
    settings: TrainSettings,
    *,
    received: Arrays,
    saved: Arrays,
    ditto_lambda: float,
    meter: WaitMeter | None = None,
    cache: CacheView | None = None,
) -> PersonalState:
    """The personal copy v, trained on loss + lambda/2 |v - received|^2 (Ditto, arXiv 2012.04221, alg. 1).

    `saved` is v of the site's last round, empty in its first: v starts at the received weights then. The
    global weights train as usual, by `train`, before or after. Raises UpdateError where `saved` does not fit.
    """
    names = set(trained(model.part))
    start = {n: t for n, t in saved.items() if n in names}
    _check_shapes(start, received)
    pulled = settings.having(proximal_mu=ditto_lambda)
    with holding(model.part, {**received, **start}):
        loss = train(model, batches, pulled, meter=meter, anchor=received, cache=cache)
        now = module.read(model.part)
    return PersonalState({n: now[n] for n in sorted(names)}, loss)


def train_fed_rod(
    model: SplitModel,
    batches: Batches,
    settings: TrainSettings,
    *,
    saved: Arrays,
    meter: WaitMeter | None = None,
    anchor: Arrays | None = None,
    cache: CacheView | None = None,
) -> tuple[float, PersonalState]:
    """Train the generic model in place and, on the same batches, the site's own classifier beside it.

    Fed-RoD (arXiv 2107.00778, eq. 8 and 9): the generic part learns by `settings.loss` (the paper: balanced softmax,
    with `class_counts`) and goes to the server; the personal classifier sees detached features and generic
    logits, learns by the plain loss and stays. Returns the generic loss and the state. Raises UpdateError
    where `saved` does not fit.
    """
    with PersonalClassifier(model.part, saved, settings) as personal:
        loss = train(
            model,
            batches,
            settings,
            meter=meter,
            anchor=anchor,
            cache=cache,
            watch=personal.learn,
        )
        return loss, personal.state()


class PersonalClassifier:
    """A linear classifier of the same shape as the generic one, whose logits are added to its own.

    Within its `with` it follows the model; `round.evaluate(..., adjust=personal.logits)` tests both together.
    """

    def __init__(self, part: Part, saved: Arrays, settings: TrainSettings | None) -> None:
        """It starts at `saved`, at zeros without. Without settings it does not learn."""
        generic = last_linear(part)
        shapes = {ROD_WEIGHT: generic.weight.shape, ROD_BIAS: (generic.out_features,)}
        start = {n: np.zeros(tuple(shape), dtype=np.float32) for n, shape in shapes.items()}
        _check_shapes(saved, start)
        self._own = {
            n: nn.Parameter(torch.from_numpy(np.array(saved.get(n, start[n])))) for n in start
        }
        self._input = LastInput(part)
        self._loss_sum, self._samples = 0.0, 0
        rates = dict.fromkeys(start, settings.train.learning_rate if settings else 0.0)
        self._optimizer = optimizer(self._own, rates, settings=settings) if settings else None
        self._loss = softmax(settings.train.label_smoothing if settings else 0.0)

    def __enter__(self) -> PersonalClassifier:
        self._input.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._input.__exit__(None, None, None)

    def logits(self, generic_BC: Tensor) -> Tensor:
        """Personal logits of the batch that just went through the tail."""
        own = self._own
        return generic_BC + nn.functional.linear(
            self._input.features, own[ROD_WEIGHT], own[ROD_BIAS]
        )

    def learn(self, generic_BC: Tensor, labels_B: Tensor) -> None:
        """One step on the batch that just went through the tail; nothing flows into the generic model."""
        assert self._optimizer is not None, "made without settings, so it does not learn"
        loss = self._loss(self.logits(generic_BC), labels_B)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self._loss_sum += float(loss.detach()) * len(labels_B)
        self._samples += len(labels_B)

    def state(self) -> PersonalState:
        """What the site keeps."""
        tensors = {n: p.detach().numpy().copy() for n, p in self._own.items()}
        return PersonalState(tensors, self._loss_sum / max(self._samples, 1))


def _check_shapes(saved: Arrays, wanted: Arrays) -> None:
    for name, tensor in saved.items():
        if name not in wanted or tensor.shape != wanted[name].shape:
            shape = wanted[name].shape if name in wanted else "no such tensor"
            raise UpdateError(
                f"the site's saved tensor {name} has shape {tensor.shape}, {shape} is wanted; it was saved by "
                f"a run with another module or classes: remove the saved state"
            )
