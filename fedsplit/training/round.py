"""One site's round: evaluate what came, train it, evaluate again. Plain PyTorch over the split model.

It knows nothing of Flower or gRPC: the encoder is core's protocol. Where the head is frozen, and in
evaluation, up to `in_flight` steps are at the encoder while the tail works. Its pieces:
settings.py, losses.py, augment.py, optimise.py (gradient -> step) and pipeline.py (batch -> what
the tail reads).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from fedsplit.core.config.train import Precision
from fedsplit.core.errors import ConfigError, DivergedError
from fedsplit.core.scores import Tally, added
from fedsplit.model.split import SplitModel
from fedsplit.training import pipeline
from fedsplit.training.activation_cache import CacheView
from fedsplit.training.augment import augment, check
from fedsplit.training.data import Batch
from fedsplit.training.meter import WaitMeter
from fedsplit.training.optimise import Arrays, Stepper
from fedsplit.training.pipeline import Flow
from fedsplit.training.settings import TrainSettings
from fedsplit.training.task import CLASSIFICATION, Task

__all__ = ["Batches", "TrainSettings", "WaitMeter", "evaluate", "train"]

Batches = Callable[[int], Iterable[Batch]]
"""epoch -> the training batches of that epoch, in their shuffled order."""
Watch = Callable[[Tensor, Tensor], None]
"""Sees the logits (detached) and labels of each batch: what else learns of them, or counts them."""
Adjust = Callable[[Tensor], Tensor]
"""Logits -> the logits that count: a personal classifier adds its own."""


def evaluate(
    model: SplitModel,
    batches: Iterable[Batch],
    *,
    in_flight: int = 2,
    meter: WaitMeter | None = None,
    cache: CacheView | None = None,
    precision: Precision = "fp32",
    adjust: Adjust | None = None,
    task: Task = CLASSIFICATION,
    watch: Watch | None = None,
) -> Tally:
    """Add up the task's sums; `watch` sees what counts. Several steps are in flight: nothing of a step depends on another.

    Raises DivergedError where they are not finite.
    """
    flow = Flow(in_flight=in_flight, meter=meter, cache=cache, precision=precision)
    tests = [task.scoring.nothing]
    with torch.no_grad():
        for batch, z in pipeline.ahead(model, batches, flow):
            logits_BC = pipeline.tail(model, z, batch.mask, precision)
            logits_BC = adjust(logits_BC) if adjust else logits_BC
            sums = task.sums(logits_BC, batch.labels)
            if not all(map(math.isfinite, sums.values())):
                raise DivergedError("the model's predictions are not finite; lower learning-rate")
            tests.append(Tally(sums=sums, samples=len(batch.labels)))
            if watch:
                watch(logits_BC, batch.labels)
    return added(tests)


def train(
    model: SplitModel,
    batches: Batches,
    settings: TrainSettings,
    *,
    meter: WaitMeter | None = None,
    anchor: Arrays | None = None,
    cache: CacheView | None = None,
    watch: Watch | None = None,
) -> float:
    """Train the model's module in place; the mean loss over all samples of the round, of the data alone.

    `anchor` is what the proximal term pulls to; without one, what the model holds now. Raises DivergedError
    when the loss stops being finite, ConfigError for settings that do not fit the model.
    """
    check(settings.train.augmentation, model.part.family.kind)
    check_cache(model, settings, cache)
    flow = Flow(
        in_flight=settings.in_flight, meter=meter, cache=cache, precision=settings.train.precision
    )
    stepper = Stepper(model.part, settings, anchor=anchor)
    total = MeanLoss(settings.train.learning_rate)
    for epoch in range(settings.epochs):
        stepper.set_factor(settings.factor(epoch))
        for loss, logits_BC, batch in _losses(
            model, augmented(batches, epoch, settings), settings, flow
        ):
            stepper.backward(loss, len(batch.labels))
            total.add(float(loss.detach()), len(batch.labels), epoch)
            if watch:
                watch(logits_BC.detach(), batch.labels)
        stepper.step()
    return total.mean


class MeanLoss:
    """The mean over samples of losses that must stay finite."""

    def __init__(self, learning_rate: float) -> None:
        self._learning_rate = learning_rate
        self._sum, self._samples = 0.0, 0

    def check(self, loss: float, epoch: int) -> None:
        """Raise DivergedError when a loss is not finite."""
        if not math.isfinite(loss):
            raise DivergedError(
                f"the training loss became {loss} in epoch {epoch + 1}; lower learning-rate "
                f"(now {self._learning_rate:g})"
            )

    def add(self, loss: float, samples: int, epoch: int) -> None:
        """Take in a batch's mean. Raises DivergedError when it is not finite."""
        self.check(loss, epoch)
        self._sum += loss * samples
        self._samples += samples

    @property
    def mean(self) -> float:
        """Of all that was added; 0 where nothing was."""
        return self._sum / max(self._samples, 1)


def augmented(batches: Batches, epoch: int, settings: TrainSettings) -> Iterator[Batch]:
    """The epoch's batches, flipped and cropped as the settings ask."""
    key = f"{settings.augmentation_key}/{epoch}"
    return (augment(batch, settings.train.augmentation, key) for batch in batches(epoch))


def check_cache(model: SplitModel, settings: TrainSettings, cache: CacheView | None) -> None:
    """Raise ConfigError where activations are not the same each time."""
    if cache is None:
        return
    if settings.train.augmentation != "none":
        raise ConfigError(
            f"augmentation={settings.train.augmentation} makes every epoch's images new, so there is nothing to "
            f"keep; use cache-activations=false or augmentation=none"
        )
    if model.head_trains() or settings.server_mode != "frozen":
        raise ConfigError(
            "activations change while the head or the server trains, so there is nothing to keep; use "
            "cache-activations=false, or device-training=tail with encoder-training=frozen"
        )


def _losses(
    model: SplitModel, batches: Iterable[Batch], settings: TrainSettings, flow: Flow
) -> Iterator[tuple[Tensor, Tensor, Batch]]:
    """(loss to go back from, logits, batch), by what trains below the tail."""
    loss_of_batch = settings.task.loss(settings)
    server = settings.server_mode
    if model.cut.a == model.cut.b:
        server = "frozen"  # nothing of this device's model is there
    if server == "zeroth-order":
        yield from _probed_losses(model, batches, settings)
        return
    if model.head_trains() or server != "frozen":
        trains = server != "frozen"
        found = pipeline.one_by_one(model, batches, flow.precision, server_trains=trains)
    else:
        found = pipeline.ahead(model, batches, flow)
    for batch, z in found:
        logits_BC = pipeline.tail(model, z, batch.mask, flow.precision)
        yield loss_of_batch(logits_BC, batch.labels), logits_BC, batch


def _probed_losses(
    model: SplitModel, batches: Iterable[Batch], settings: TrainSettings
) -> Iterator[tuple[Tensor, Tensor, Batch]]:
    """FedVZ: the server learns from K numbers a step, the tail from their mean's exact gradient, here.

    No gradient crosses the wire in either direction, so the head cannot train by one. Raises ConfigError
    where it is meant to.
    """
    if model.head_trains():
        raise ConfigError(
            "encoder-training=zeroth-order sends no gradient down, so the head cannot train by one; use "
            "device-training=tail"
        )
    loss_of_batch = settings.task.loss(settings)
    for batch, z_K, settle in pipeline.probed(model, batches, settings.train.precision):
        logits = [pipeline.tail(model, z, batch.mask, settings.train.precision) for z in z_K]
        losses_K = torch.stack([loss_of_batch(logits_BC, batch.labels) for logits_BC in logits])
        # Whoever asks for the next batch has found the loss to be finite and has trained the tail.
        yield losses_K.mean(), logits[-1], batch
        settle(losses_K.detach())
