"""One site's round: evaluate what came, train it, evaluate again. Plain PyTorch over the split model.

Called by federation/site.py. It knows nothing of Flower or gRPC: the encoder is core's protocol. Where the
head is frozen, and in evaluation, up to `in_flight` steps are at the encoder while the tail works.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fedsplit.core.encoder import Array, Encoder, Mask
from fedsplit.core.errors import FederationError
from fedsplit.model import module
from fedsplit.model.split import SplitModel
from fedsplit.training.data import Batch

Batches = Callable[[int], Iterable[Batch]]
"""epoch -> the training batches of that epoch, in their shuffled order."""


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How a site trains in a round."""

    epochs: int
    learning_rate: float
    optimizer: Literal["adamw", "sgd"] = "adamw"
    weight_decay: float = 0.0
    in_flight: int = 2
    lora_learning_rate: float = 0.0
    """Learning rate of LoRA where it is not the classifier's; 0: the same."""
    schedule: tuple[float, ...] = ()
    """Factor on the learning rates, one an epoch; empty: 1 throughout."""


@dataclass(frozen=True)
class Score:
    """How a module does on some test samples."""

    correct: int
    total: int


class WaitMeter:
    """An Encoder that adds up how long the training thread waited for the one behind it."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._thread = threading.get_ident()
        self.wait_s = 0.0

    def encode(
        self, step: int, h_BTD: Array, mask_BT: Mask | None = None, *, keep: bool = False
    ) -> Array:
        """See core.encoder.Encoder."""
        with self.waiting():
            return self._encoder.encode(step, h_BTD, mask_BT, keep=keep)

    def backprop(self, step: int, dz: Array) -> Array:
        """See core.encoder.Encoder."""
        with self.waiting():
            return self._encoder.backprop(step, dz)

    def close(self) -> None:
        """See core.encoder.Encoder."""
        self._encoder.close()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside, on the training thread only: steps in flight overlap its work."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if threading.get_ident() == self._thread:
                self.wait_s += time.perf_counter() - start


def evaluate(
    model: SplitModel,
    batches: Iterable[Batch],
    *,
    in_flight: int = 2,
    meter: WaitMeter | None = None,
) -> Score:
    """Count right answers. Several steps are in flight: nothing of a step depends on another."""
    correct = total = 0
    with torch.no_grad():
        for batch, z in _encoded_ahead(model, batches, in_flight, meter):
            predicted_B = model.tail(z, batch.mask).argmax(dim=1)
            correct += int((predicted_B == batch.labels).sum())
            total += len(batch.labels)
    return Score(correct, total)


def train(
    model: SplitModel, batches: Batches, settings: TrainSettings, *, meter: WaitMeter | None = None
) -> float:
    """Train the model's module in place; the mean loss over all samples of the round.

    Raises FederationError when the loss stops being finite.
    """
    optimizer = _optimizer(model, settings)
    loss_sum, samples = 0.0, 0
    for epoch in range(settings.epochs):
        if settings.schedule:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * settings.schedule[epoch]
        for batch, z in _encoded(model, batches(epoch), settings.in_flight, meter):
            loss = nn.functional.cross_entropy(model.tail(z, batch.mask), batch.labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            value = float(loss.detach())
            if not torch.isfinite(loss.detach()):
                raise FederationError(
                    f"the training loss became {value} in epoch {epoch + 1}; lower learning-rate "
                    f"(now {settings.learning_rate:g})"
                )
            loss_sum += value * len(batch.labels)
            samples += len(batch.labels)
    return loss_sum / max(samples, 1)


def _optimizer(model: SplitModel, settings: TrainSettings) -> torch.optim.Optimizer:
    """An optimiser with one parameter group for LoRA and one for the classifier."""
    trainable = {n: p for n, p in module.parameters(model.part).items() if p.requires_grad}
    lora = [p for n, p in trainable.items() if ".lora_" in n]
    classifier = [p for n, p in trainable.items() if ".lora_" not in n]
    rates = (settings.lora_learning_rate or settings.learning_rate, settings.learning_rate)
    groups = [
        {"params": parameters, "lr": rate, "initial_lr": rate}
        for parameters, rate in zip((lora, classifier), rates, strict=True)
        if parameters
    ]
    kind = torch.optim.AdamW if settings.optimizer == "adamw" else torch.optim.SGD
    return kind(groups, weight_decay=settings.weight_decay)


def _encoded(
    model: SplitModel, batches: Iterable[Batch], in_flight: int, meter: WaitMeter | None
) -> Iterator[tuple[Batch, Tensor]]:
    """Batches with what came back from the encoder; ahead of the tail where the head does not train."""
    if model.head_trains():
        for batch in batches:
            yield batch, model.encode(model.head(batch.inputs, batch.mask), batch.mask)
    else:
        yield from _encoded_ahead(model, batches, in_flight, meter)


def _encoded_ahead(
    model: SplitModel, batches: Iterable[Batch], in_flight: int, meter: WaitMeter | None
) -> Iterator[tuple[Batch, Tensor]]:
    if model.cut.a == model.cut.b:
        for batch in batches:
            yield batch, model.head(batch.inputs, batch.mask)
        return
    waiting: deque[tuple[Batch, Future[Tensor]]] = deque()
    with ThreadPoolExecutor(max_workers=in_flight, thread_name_prefix="in-flight") as pool:
        for batch in batches:
            with torch.no_grad():
                h = model.head(batch.inputs, batch.mask)
            waiting.append((batch, pool.submit(model.encode, h, batch.mask)))
            if len(waiting) == in_flight:
                yield _next(waiting, meter)
        while waiting:
            yield _next(waiting, meter)


def _next(
    waiting: deque[tuple[Batch, Future[Tensor]]], meter: WaitMeter | None
) -> tuple[Batch, Tensor]:
    batch, future = waiting.popleft()
    if meter is None:
        return batch, future.result()
    with meter.waiting():
        return batch, future.result()
