"""Training by forwards alone: for devices without the memory for a backward.

Every step measures losses at weights moved along directions made of a seed, and steps by what they say
(core/directions.py; MeZO, arXiv 2305.17333). What is left of a round is (seed, scalars): `replay` makes the
same weights of them, bit for bit, for both sides do the same numpy arithmetic. Shapes: S steps, Q queries.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedsplit.core import directions
from fedsplit.core.encoder import Directions, Estimator
from fedsplit.core.errors import ConfigError, ProtocolError
from fedsplit.model.module import ModuleTensors
from fedsplit.model.split import SplitModel
from fedsplit.training import pipeline
from fedsplit.training.activation_cache import CacheView
from fedsplit.training.augment import check
from fedsplit.training.data import Batch
from fedsplit.training.losses import Loss
from fedsplit.training.meter import WaitMeter
from fedsplit.training.optimise import Arrays, learning_rates, trained
from fedsplit.training.pipeline import Flow
from fedsplit.training.round import Batches, MeanLoss, augmented, check_cache
from fedsplit.training.settings import TrainSettings

Scalars = NDArray[np.float32]
"""[S, Q]: `directions.coefficients` of each step's queries."""


@dataclass(frozen=True, kw_only=True)
class ZerothOrder:
    """How gradients are estimated. `seed` must be another one for each site and round."""

    seed: int
    estimator: Estimator = "central"
    queries: int = 1
    epsilon: float = 0.01
    directions: Directions = "gaussian"


def train_zeroth_order(
    model: SplitModel,
    batches: Batches,
    settings: TrainSettings,
    zo: ZerothOrder,
    meter: WaitMeter | None = None,
    *,
    cache: CacheView | None = None,
) -> tuple[float, Scalars]:
    """Train what the device trains, in place, without a backward; (mean loss, scalars).

    The steps are plain SGD with decoupled weight decay, whatever `settings.optimizer` says. The activations
    of a batch are fetched once where only the tail trains, once a forward where the head does. Beside the
    model it holds a copy of what trains and one direction. Raises FederationError when a loss is not finite,
    ConfigError for settings that need a gradient.
    """
    _check(model, settings)
    check_cache(model, settings, cache)
    flow = Flow(
        in_flight=settings.in_flight, meter=meter, cache=cache, precision=settings.train.precision
    )
    measured = Measured(model, zo, settings.task.loss(settings), settings)
    rates = learning_rates(model.part, settings)
    total = MeanLoss(settings.train.learning_rate)
    scalars: list[Scalars] = []
    steps = count()
    with torch.no_grad():
        for epoch in range(settings.epochs):
            for batch, z in _batches(model, augmented(batches, epoch, settings), flow):
                step = next(steps)
                losses = measured.losses(batch, z, step)
                for loss in losses:
                    total.check(loss, epoch)
                scalars.append(scalars_of(losses, zo, measured.shapes))
                measured.values = _stepped(
                    measured.values,
                    scalars[-1],
                    step,
                    zo,
                    rates,
                    settings.factor(epoch),
                    settings.train.weight_decay,
                )
                measured.restore()
                centre = losses[0] if zo.estimator == "forward" else float(np.mean(losses))
                total.add(centre, len(batch.labels), epoch)
    return total.mean, np.array(scalars, dtype=np.float32).reshape(len(scalars), zo.queries)


def replay(
    tensors: Arrays,
    scalars: Scalars,
    zo: ZerothOrder,
    rates: Mapping[str, float],
    *,
    factors: Sequence[float] = (),
    weight_decay: float = 0.0,
) -> ModuleTensors:
    """What a device's tensors became: those it started from, its scalars and its settings.

    `rates` names each tensor it trained with its learning rate (`optimise.learning_rates`); `factors` are the
    schedule's, one a step, empty for 1 throughout. Other tensors come back as they are. Raises ProtocolError
    for scalars that no such training gives.
    """
    if scalars.ndim != 2 or scalars.shape[1] != zo.queries or scalars.dtype != np.float32:
        raise ProtocolError(
            f"scalars are {scalars.dtype} {scalars.shape}; float32 (steps, {zo.queries}) is wanted"
        )
    if not np.isfinite(scalars).all():
        raise ProtocolError("scalars are not finite; they cannot be used")
    if factors and len(factors) != len(scalars):
        raise ProtocolError(f"{len(scalars)} steps of scalars, {len(factors)} are wanted")
    values = {name: np.asarray(tensors[name], dtype=np.float32) for name in rates}
    for step, scalars_q in enumerate(scalars):
        factor = factors[step] if factors else 1.0
        values = _stepped(values, scalars_q, step, zo, rates, factor, weight_decay)
    return {**{n: np.asarray(t, dtype=np.float32) for n, t in tensors.items()}, **values}


def scalars_of(losses: Sequence[float], zo: ZerothOrder, shapes: directions.Shapes) -> Scalars:
    """A step's scalars, rounded as they travel."""
    found = directions.coefficients(
        zo.estimator,
        losses,
        epsilon=zo.epsilon,
        dim=directions.dimension(shapes),
        kind=zo.directions,
    )
    return found.astype(np.float32)


class Measured:
    """A model whose trained tensors are moved about; `values` are where they stand in truth."""

    def __init__(
        self, model: SplitModel, zo: ZerothOrder, loss: Loss, settings: TrainSettings
    ) -> None:
        self._model, self._zo, self._loss = model, zo, loss
        self._precision = settings.train.precision
        self._parameters = trained(model.part)
        self.values: ModuleTensors = {
            n: p.detach().cpu().numpy().copy() for n, p in self._parameters.items()
        }
        self.shapes = {n: t.shape for n, t in self.values.items()}

    def losses(self, batch: Batch, z: Tensor | None, step: int) -> list[float]:
        """The K losses of a step, in the order of `directions.points`; the model ends where it was."""
        zo, found = self._zo, []
        last, u = -1, dict[str, NDArray[np.float32]]()
        try:
            for query, factor in directions.points(zo.estimator, zo.queries):
                if factor and query != last:
                    u = directions.direction(zo.seed, step, query, self.shapes, zo.directions)
                    last = query
                self._move(u, factor * zo.epsilon)
                found.append(self._forward(batch, z))
        finally:
            self.restore()
        return found

    def restore(self) -> None:
        """Put `values` into the model: copied, so not a bit is lost to moving there and back."""
        for name, parameter in self._parameters.items():
            _fill(parameter, self.values[name])

    def _move(self, u: Mapping[str, NDArray[np.float32]], length: float) -> None:
        for name, parameter in self._parameters.items():
            value = self.values[name]
            _fill(parameter, value + np.float32(length) * u[name] if length else value)

    def _forward(self, batch: Batch, z: Tensor | None) -> float:
        if z is None:
            h_BTD = pipeline.head(self._model, batch, self._precision)
            z = self._model.encode(h_BTD, batch.mask)
        logits_BC = pipeline.tail(self._model, z, batch.mask, self._precision)
        return float(self._loss(logits_BC, batch.labels))


def _batches(
    model: SplitModel, batches: Iterable[Batch], flow: Flow
) -> Iterable[tuple[Batch, Tensor | None]]:
    """Batches with their activations; without them where every forward has its own."""
    if model.head_trains():
        return ((batch, None) for batch in batches)
    return pipeline.ahead(model, batches, flow)


def _fill(parameter: nn.Parameter, value: NDArray[np.float32]) -> None:
    with torch.no_grad():
        parameter.copy_(torch.from_numpy(value))


def _stepped(
    values: ModuleTensors,
    scalars_q: Scalars,
    step: int,
    zo: ZerothOrder,
    rates: Mapping[str, float],
    factor: float,
    weight_decay: float,
) -> ModuleTensors:
    """One SGD step in numpy: the device and the replay both come through here."""
    gradient = directions.estimate(
        [float(s) for s in scalars_q],
        seed=zo.seed,
        step=step,
        shapes={n: t.shape for n, t in values.items()},
        kind=zo.directions,
    )
    moved = {}
    for name, value in values.items():
        rate = rates[name] * factor
        kept = value * np.float32(1 - rate * weight_decay) if weight_decay else value
        moved[name] = kept - np.float32(rate) * gradient[name]
    return moved


def _check(model: SplitModel, settings: TrainSettings) -> None:
    check(settings.train.augmentation, model.part.family.kind)
    faults = [
        f"{name} needs a gradient"
        for name, used in (
            ("clip_norm", settings.train.clip_norm),
            ("accumulate", settings.train.accumulate > 1),
            ("proximal_mu", settings.train.proximal_mu),
            (f"encoder-training={settings.server_mode}", settings.server_mode != "frozen"),
        )
        if used
    ]
    if faults:
        raise ConfigError(
            f"gradient=zeroth-order trains by forwards alone: {', '.join(faults)}; switch them off or use "
            f"gradient=exact"
        )
