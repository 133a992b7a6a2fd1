"""From batches to what the tail reads: head, encoder, cache, with several steps in flight where that is allowed.

The head and the tail run in the precision asked for; what crosses the seam is always fp32, for the
encoder's precision is not the device's affair.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsplit.core.config.train import Precision
from fedsplit.model.split import SplitModel
from fedsplit.model.trunk import autocast
from fedsplit.training.activation_cache import CacheView, Lookup
from fedsplit.training.data import Batch
from fedsplit.training.meter import WaitMeter


@dataclass(frozen=True, kw_only=True)
class Flow:
    """How batches go through head and encoder."""

    in_flight: int = 2
    meter: WaitMeter | None = None
    cache: CacheView | None = None
    precision: Precision = "fp32"


def head(model: SplitModel, batch: Batch, precision: Precision = "fp32") -> Tensor:
    """What crosses the seam, fp32 [B, T, D]."""
    with autocast(model.part.device, precision):
        h_BTD = model.head(batch.inputs, batch.mask)
    return h_BTD.float()


def tail(
    model: SplitModel, z: Tensor, mask_BT: Tensor | None, precision: Precision = "fp32"
) -> Tensor:
    """Logits, fp32 [B, C]."""
    with autocast(model.part.device, precision):
        logits_BC = model.tail(z, mask_BT)
    return logits_BC.float()


def one_by_one(
    model: SplitModel,
    batches: Iterable[Batch],
    precision: Precision = "fp32",
    *,
    server_trains: bool = False,
) -> Iterator[tuple[Batch, Tensor]]:
    """Each batch goes when the one before it is done: where gradients go back through the seam.

    Also with `server_trains` and a frozen head, though nothing comes back then: a step in flight would run
    with weights that hang on who was faster.
    """
    for batch in batches:
        h_BTD = head(model, batch, precision)
        if server_trains and not h_BTD.requires_grad:
            # How the seam is told that the encoder wants a gradient and the device none.
            h_BTD = h_BTD.detach().requires_grad_()
        yield batch, model.encode(h_BTD, batch.mask)


def probed(
    model: SplitModel, batches: Iterable[Batch], precision: Precision = "fp32"
) -> Iterator[tuple[Batch, Tensor, Callable[[Tensor], None]]]:
    """Batches with what K perturbed encoders made of them, [K, B, ...], and where to send the K losses."""
    for batch in batches:
        with torch.no_grad():
            h_BTD = head(model, batch, precision)
        z_K, settle = model.probe(h_BTD, batch.mask)
        yield batch, z_K, settle


def ahead(
    model: SplitModel, batches: Iterable[Batch], flow: Flow
) -> Iterator[tuple[Batch, Tensor]]:
    """Up to `in_flight` batches are at the encoder while the caller works: where nothing below trains."""
    if model.cut.a == model.cut.b:
        for found in _look_up(batches, flow.cache):
            z = None if found.missing is None else head(model, found.missing, flow.precision)
            yield found.batch, _complete(flow.cache, found, z)
        return
    waiting: deque[tuple[Lookup, Callable[[], Tensor | None]]] = deque()
    with ThreadPoolExecutor(flow.in_flight, thread_name_prefix="in-flight") as pool:
        for found in _look_up(batches, flow.cache):
            waiting.append((found, _start(model, found.missing, pool, flow)))
            if len(waiting) == flow.in_flight:
                yield _finish(waiting, flow)
        while waiting:
            yield _finish(waiting, flow)


def _look_up(batches: Iterable[Batch], cache: CacheView | None) -> Iterator[Lookup]:
    for batch in batches:
        yield cache.look_up(batch) if cache else Lookup(batch, (), batch)


def _complete(cache: CacheView | None, found: Lookup, z: Tensor | None) -> Tensor:
    if cache is not None:
        return cache.complete(found, z)
    assert z is not None, "without a cache every batch is computed"
    return z


def _start(
    model: SplitModel, batch: Batch | None, pool: ThreadPoolExecutor, flow: Flow
) -> Callable[[], Tensor | None]:
    """Send a batch on its way; what is returned waits for its answer."""
    if batch is None:
        return lambda: None
    with torch.no_grad():
        h_BTD = head(model, batch, flow.precision)
    future: Future[Tensor] = pool.submit(model.encode, h_BTD, batch.mask)
    return future.result


def _finish(
    waiting: deque[tuple[Lookup, Callable[[], Tensor | None]]], flow: Flow
) -> tuple[Batch, Tensor]:
    found, answer = waiting.popleft()
    with flow.meter.waiting() if flow.meter else nullcontext():
        z = answer()
    return found.batch, _complete(flow.cache, found, z)
