"""What a round costs a device in floating-point operations: measured on one sample of head and
tail, times the samples that went through. What the encoder computes is not in it.

torch counts matrix products and convolutions (2 operations a multiply-add), forward and backward as autograd
runs them, so that frozen weights cost no weight gradient; norms and activations, some per cent, are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from fedsplit.core import directions
from fedsplit.core.encoder import Estimator
from fedsplit.model.split import SplitModel
from fedsplit.training.activation_cache import part
from fedsplit.training.data import Batch
from fedsplit.training.optimise import trained

_MOST_MEASURED = 256


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Operations of one sample."""

    head: int
    """A forward of the head."""
    tail: int
    """A forward of the tail."""
    head_step: int
    """Forward, and backward where the head trains."""
    tail_step: int
    """Forward and backward, down to the seam where a gradient goes through it."""


class DeviceFlops:
    """Operations on a device; what a sample costs is measured once for each model, cut and size."""

    def __init__(self) -> None:
        self._measured: dict[Any, Flops] = {}

    def of_round(
        self,
        model: SplitModel,
        batch: Batch,
        *,
        train_samples: int,
        eval_samples: int,
        cached_samples: int = 0,
        estimator: Estimator | None = None,
        queries: int = 1,
        server_probes: int = 0,
        server_trains: bool = False,
    ) -> int:
        """Operations of a round on this device, for samples as large as the first of `batch`.

        `train_samples` and `eval_samples` count a sample once a pass, so times the epochs; `cached_samples` of
        them found their activations in the cache and cost no head. `estimator`: the device trains by forwards
        alone, `queries` directions a step. `server_probes`: the K outputs a step for which the tail runs in zeroth
        order at the server; `server_trains`: a gradient goes up though the head is frozen.
        """
        one = self.of_sample(model, batch, server_trains=server_trains)
        if estimator is None:
            passes = max(server_probes, 1)
            total = train_samples * (one.head_step + passes * one.tail_step)
        else:
            forwards = len(directions.points(estimator, queries))
            heads = forwards if model.head_trains() else 1
            total = train_samples * (heads * one.head + forwards * one.tail)
        total += eval_samples * (one.head + one.tail) - cached_samples * one.head
        return max(total, 0)

    def of_sample(self, model: SplitModel, batch: Batch, *, server_trains: bool = False) -> Flops:
        """Operations of the batch's first sample; measured once for each model, cut and size."""
        first = part(batch, [0])
        key = (
            # Not by its path: another model may lie there by now.
            model.part.backbone.config_json,
            model.cut,
            tuple((n, tuple(t.shape)) for n, t in sorted(first.inputs.items())),
            tuple((n, tuple(p.shape)) for n, p in sorted(trained(model.part).items())),
            server_trains,
        )
        if key not in self._measured:
            if len(self._measured) >= _MOST_MEASURED:
                self._measured.clear()
            # Nothing of the model is kept with the numbers.
            self._measured[key] = _measure(model, first, server_trains=server_trains)
        return self._measured[key]


def _measure(model: SplitModel, first: Batch, *, server_trains: bool) -> Flops:
    below = model.head_trains()
    with torch.no_grad(), _Counting() as head:
        h = model.head(first.inputs, first.mask)
    if model.cut.pooled(model.part.backbone.blocks):
        z = h.new_zeros(len(h), model.part.backbone.pooled_width)
    else:
        z = h.clone()
    with torch.no_grad(), _Counting() as tail:
        model.tail(z, first.mask)
    head_step = head
    if below:
        with torch.enable_grad(), _Counting() as head_step:
            h = model.head(first.inputs, first.mask)
            _backward(model, h, [])
    z.requires_grad_(below or server_trains)
    with torch.enable_grad(), _Counting() as tail_step:
        _backward(model, model.tail(z, first.mask), [z] if z.requires_grad else [])
    return Flops(
        head=head.total, tail=tail.total, head_step=head_step.total, tail_step=tail_step.total
    )


class _Counting(TorchDispatchMode):
    """Counts the operations inside, by torch's own formulas.

    Not torch's FlopCounterMode: it follows modules by hooks that every thread of the process runs into, and has no
    formula for the CPU's fused attention. Switching that off would do so for other threads, too, whose training
    then rounds otherwise.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0
        """Operations so far."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and add what it costs."""
        del types
        out = func(*args, **(kwargs or {}))
        formula = _FORMULAS.get(func._overloadpacket)
        if formula is not None:
            self.total += int(formula(*args, **(kwargs or {}), out_val=out))
        return out


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))  # type: ignore[no-untyped-call]


def _attention_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> int:
    shapes = (gradient.shape, query.shape, key.shape, value.shape)
    return int(sdpa_backward_flop_count(*shapes))  # type: ignore[no-untyped-call]


_aten = torch.ops.aten
_FORMULAS: dict[Any, Any] = {
    **flop_registry,
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def _backward(model: SplitModel, output: Tensor, also: list[Tensor]) -> None:
    """Gradients for all that trains and `also`, without leaving them anywhere."""
    wanted = [*trained(model.part).values(), *also]
    if wanted and output.requires_grad:
        torch.autograd.grad(output, wanted, torch.ones_like(output), allow_unused=True)
