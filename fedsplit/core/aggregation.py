"""Checks a site's module update and averages the updates of a round, tensor by tensor. numpy only.

Per-tensor, sample-weighted averaging (FedAvg, arXiv 1602.05629) over the sites that trained the tensor, so
sites with different cuts train one module in one round. What LoRA's pairs need beyond that (products, ranks)
is in `lora_rules`, which builds on this file; `federation.server.combine.rules` puts robust rules and server
optimisers on top.
"""

from __future__ import annotations

import statistics
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
    """What it counts for."""
    delta: Tensors


def check_update(
    update: Update, *, module: Tensors, trained: Collection[str], samples: int
) -> None:
    """Raise UpdateError unless the update is what this site was asked for.

    `module` are the tensors that this site received (with a rank of its own its LoRA pairs are narrower than
    the run's), `trained` the names it was to train, `samples` the training samples that it reported at roll
    call, the most that it may have.
    """
    faults = _name_faults(update, trained)
    for name in sorted(set(update.delta) & set(trained)):
        faults += _tensor_faults(name, update.delta[name], module[name])
    # Files may vanish while a run lasts, so a site may come to have fewer.
    if not 1 <= update.samples <= samples:
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
    ordered = in_order(updates)
    merged: dict[str, NDArray[np.float32]] = {}
    for name, value in module.items():
        parts = [(float(u.samples), u.delta[name]) for u in ordered if name in u.delta]
        merged[name] = moved(value, parts) if parts else value
    return merged


def in_order(updates: Sequence[Update]) -> list[Update]:
    """The updates by the sites' names. Raises FederationError when none came in or one has no samples."""
    if not updates:
        raise FederationError("no useful update came in, so there is nothing to aggregate")
    if empty := [u.site for u in updates if u.samples < 1]:
        raise FederationError(
            f"the update of site {sorted(empty)[0]!r} counts for no sample, at least 1 is wanted; "
            f"leave sites without training data out of the round"
        )
    return sorted(updates, key=lambda update: update.site)


def moved(
    value: NDArray[np.float32], parts: Sequence[tuple[float, NDArray[np.float32]]]
) -> NDArray[np.float32]:
    """`value` + weighted mean of `parts`, (weight, delta) each; summed in float64 in the order given."""
    total = np.zeros(value.shape, dtype=np.float64)
    for weight, delta in parts:
        total += weight * delta.astype(np.float64)
    mean = total / sum(weight for weight, _ in parts)
    moved_value: NDArray[np.float32] = (value.astype(np.float64) + mean).astype(np.float32)
    return moved_value


def capped(samples: Mapping[str, int], share: float) -> dict[str, int]:
    """What each site counts for: its samples, but at most `share` of all together or three times the median.

    Whichever is more; `share` is from 0.5, at which none counts for more than all others, to 1 for no bound. Of two sites
    the median is the smaller: what a site says of itself must not raise its own bound.
    """
    if share >= 1 or not samples:
        return dict(samples)
    total, median = sum(samples.values()), statistics.median_low(samples.values())
    factor = share / (1 - share)
    return {
        site: min(count, max(int(factor * (total - count)), 3 * median))
        for site, count in samples.items()
    }


# A robust rule by name: how many sites it needs to stand `f` hostile ones, as (factor, constant) of f.
_NEEDED = {
    "mean": (0, 1),
    "trimmed-mean": (2, 1),
    "median": (2, 1),
    "krum": (2, 3),
    "multi-krum": (2, 3),
    "bulyan": (4, 3),
}


def sites_needed(robust_rule: str, byzantine_sites: int) -> int:
    """Sites that must have trained a tensor for the rule to stand `byzantine_sites` hostile ones.

    Krum and Multi-Krum: 2f + 3 (arXiv 1703.02757); Bulyan: 4f + 3 (arXiv 1802.07927); trimmed mean and median:
    2f + 1 (arXiv 1803.01498).
    """
    factor, constant = _NEEDED[robust_rule]
    return factor * byzantine_sites + constant
