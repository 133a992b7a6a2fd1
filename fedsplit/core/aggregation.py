"""Checks a site's module update and averages the updates of a round, tensor by tensor. numpy only.

Per-tensor, sample-weighted averaging (FedAvg, arXiv 1602.05629) over the sites that trained the tensor, so
sites with different cuts train one module in one round. LoRA's A and B are averaged each for itself (FedIT's
plain rule): mean(B) mean(A) is not mean(BA), which the docs say.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsplit.core.errors import FederationError, UpdateError

Tensors = Mapping[str, NDArray[np.float32]]

# Far above any sane step of a LoRA or classifier weight; a larger one is a broken or hostile site.
MAX_ABSOLUTE = 1e4


@dataclass(frozen=True, kw_only=True)
class Update:
    """One site's contribution to a round: deltas of the tensors that it trained, and its samples."""

    site: str
    samples: int
    delta: Tensors


def check_update(
    update: Update, *, module: Tensors, trained: Collection[str], samples: int
) -> None:
    """Raise UpdateError unless the update is what this site was asked for.

    `trained` are the names it was to train, `samples` the training samples that it reported at roll call.
    """
    faults = _name_faults(update, trained)
    for name in sorted(set(update.delta) & set(trained)):
        faults += _tensor_faults(name, update.delta[name], module[name])
    if update.samples != samples or samples < 1:
        faults.append(f"it says {update.samples} samples, at roll call it said {samples}")
    if faults:
        shown = "; ".join(faults[:3]) + (f"; and {len(faults) - 3} more" if len(faults) > 3 else "")
        raise UpdateError(f"update of site {update.site!r} refused: {shown}")


def _name_faults(update: Update, trained: Collection[str]) -> list[str]:
    faults = []
    if extra := sorted(set(update.delta) - set(trained)):
        faults.append(f"{len(extra)} tensors it was not to train, e.g. {extra[0][:200]}")
    if missing := sorted(set(trained) - set(update.delta)):
        faults.append(f"{len(missing)} tensors are missing, e.g. {missing[0]}")
    return faults


def _tensor_faults(name: str, got: NDArray[np.float32], want: NDArray[np.float32]) -> list[str]:
    if got.dtype != np.float32:
        return [f"{name} is {got.dtype}, float32 is wanted"]
    if got.shape != want.shape:
        return [f"{name} has shape {got.shape}, {want.shape} is wanted"]
    if not np.isfinite(got).all():
        return [f"{name} holds NaN or infinity; lower the learning rate at that site"]
    if got.size and float(np.abs(got).max()) > MAX_ABSOLUTE:
        return [f"{name} moves by more than {MAX_ABSOLUTE:g}"]
    return []


def aggregate(module: Tensors, updates: Sequence[Update]) -> dict[str, NDArray[np.float32]]:
    """module + sample-weighted mean of the deltas, per tensor over the sites that trained it.

    Tensors that nobody trained stay as they are. The order of the sites does not change the result: sums
    are in float64 and in the order of the sites' names.
    """
    if not updates:
        raise FederationError("no useful update came in, so there is nothing to aggregate")
    ordered = sorted(updates, key=lambda update: update.site)
    merged: dict[str, NDArray[np.float32]] = {}
    for name, value in module.items():
        trained = [u for u in ordered if name in u.delta]
        if not trained:
            merged[name] = value
            continue
        total = np.zeros(value.shape, dtype=np.float64)
        for update in trained:
            total += update.samples * update.delta[name].astype(np.float64)
        mean = total / sum(u.samples for u in trained)
        merged[name] = (value.astype(np.float64) + mean).astype(np.float32)
    return merged
