"""Simulation only: deal samples that belong together, whole groups at a time.

Crops of one board look alike. Were they dealt singly, one site would train on what another tests on. So a
board, or whatever else `groups` numbers, goes whole to one site:

- iid: groups in random order, each to the site that has the fewest samples so far.
- quantity: the same towards sizes that are drawn from Dirichlet(alpha).
- dirichlet, pathological: groups are dealt as in iid. Then every site keeps of its own samples those that
  follow its label skew and the rest is used by nobody: whole boards with a board's mix of classes and a site
  with another mix cannot both be had. dirichlet: the site draws shares of the classes it holds from
  Dirichlet(alpha) and keeps the largest random choice with exactly these shares, rounded down. pathological:
  it keeps all samples of its classes, which are dealt in turn.

How much is left: pathological:k about k/K of all samples with K classes; dirichlet about a site's samples of
one class over its largest share; measured with 7 classes: a fifth of all at alpha 0.1, 0.4 at alpha 1.
"""

from __future__ import annotations

import heapq
import logging
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedsplit.core.errors import ConfigError
from fedsplit.training.data.examples import Index

log = logging.getLogger(__name__)

_DRAWS = 50
_LEAST_SHARE = 1e-12
_GROUPS_A_SITE = 2
"""No site gets fewer: one trains, one tests."""


class Skew(Protocol):
    """What partition.py's `Partition` says; a protocol, for that file imports this one."""

    @property
    def kind(self) -> str:
        """iid, dirichlet, pathological or quantity."""
        ...

    @property
    def value(self) -> float:
        """alpha, or the classes a site."""
        ...


def deal_groups(
    labels: NDArray[np.integer],
    groups: NDArray[np.integer],
    spec: Skew,
    sites: int,
    rng: np.random.Generator,
    *,
    min_samples: int,
) -> list[Index]:
    """Sorted positions for each site, no group on two of them. Raises ConfigError where it cannot be done."""
    if len(groups) != len(labels):
        raise ConfigError(f"{len(groups)} groups for {len(labels)} labels; each sample needs one")
    names, number = np.unique(groups, return_inverse=True)
    members = np.split(np.argsort(number, kind="stable"), np.cumsum(np.bincount(number))[:-1])
    if len(names) < _GROUPS_A_SITE * sites:
        raise ConfigError(
            f"partition={spec}: {len(names)} groups are too few for {sites} sites with at least "
            f"{_GROUPS_A_SITE} each, one to train and one to test; use fewer sites or data of more groups"
        )
    wanted = _sizes(len(labels), spec, sites, rng, min_samples)
    hands = _deal([len(m) for m in members], wanted, rng, min_samples)
    parts = [np.sort(np.concatenate([members[g] for g in hand])) for hand in hands]
    if spec.kind == "dirichlet":
        parts = [
            _draw_mix(p, labels, number, spec, rng, min_samples, i) for i, p in enumerate(parts)
        ]
    elif spec.kind == "pathological":
        parts = _keep_classes(parts, labels, number, spec, rng, min_samples)
    return parts


def _sizes(
    total: int, spec: Skew, sites: int, rng: np.random.Generator, min_samples: int
) -> NDArray[np.float64]:
    """Samples that each site should get, before a group's size gets in the way."""
    if spec.kind != "quantity":
        return np.full(sites, total / sites)
    free = total - sites * min_samples
    sizes: NDArray[np.float64] = min_samples + free * rng.dirichlet(np.full(sites, spec.value))
    return sizes


def _deal(
    sizes: list[int], wanted: NDArray[np.float64], rng: np.random.Generator, min_samples: int
) -> list[list[int]]:
    """Group numbers of each site: first what every site needs, then to the one that lacks most."""
    order = iter(rng.permutation(len(sizes)).tolist())
    hands: list[list[int]] = [[] for _ in wanted]
    missing = wanted.copy()
    for i, hand in enumerate(hands):
        while len(hand) < _GROUPS_A_SITE or sum(sizes[g] for g in hand) < min_samples:
            g = next(order, None)
            if g is None:
                raise ConfigError(
                    f"{len(sizes)} groups of {sum(sizes)} samples are too few for {len(hands)} sites with "
                    f"at least {min_samples} samples each; use fewer sites or more samples"
                )
            hand.append(g)
            missing[i] -= sizes[g]
    heap = [(-lack, i) for i, lack in enumerate(missing.tolist())]
    heapq.heapify(heap)
    for g in order:
        lack, i = heap[0]
        hands[i].append(g)
        heapq.heapreplace(heap, (lack + sizes[g], i))
    return hands


def _draw_mix(
    part: Index,
    labels: NDArray[np.integer],
    number: NDArray[np.integer],
    spec: Skew,
    rng: np.random.Generator,
    min_samples: int,
    site: int,
) -> Index:
    """The largest random choice of a site's samples whose classes have shares drawn from Dirichlet(alpha)."""
    order = rng.permutation(part)
    held = np.unique(labels[part])
    pools = [order[labels[order] == c] for c in held]
    counts = np.array([len(pool) for pool in pools])
    for _ in range(_DRAWS):
        shares = rng.dirichlet(np.full(len(held), spec.value))
        if not (np.isfinite(shares).all() and shares.sum() > 0):
            continue  # an alpha near zero underflows
        drawn = shares > _LEAST_SHARE
        total = (counts[drawn] / shares[drawn]).min()
        keep = np.floor(total * shares + 1e-9).astype(np.int64)
        chosen = np.concatenate([pool[:n] for pool, n in zip(pools, keep, strict=True)])
        if _fault(chosen, number, min_samples) is None:
            return np.sort(chosen)
    raise ConfigError(
        f"partition={spec}: of the {len(part)} samples of site {site} no draw of classes keeps "
        f"{min_samples} samples of {_GROUPS_A_SITE} groups; use a larger ALPHA, fewer sites or more samples"
    )


def _keep_classes(
    parts: list[Index],
    labels: NDArray[np.integer],
    number: NDArray[np.integer],
    spec: Skew,
    rng: np.random.Generator,
    min_samples: int,
) -> list[Index]:
    """Each site's samples of its own classes; classes are dealt in turn, so all are in use."""
    per_site = int(spec.value)
    present = np.unique(labels)
    if per_site > len(present):
        raise ConfigError(
            f"partition={spec} wants {per_site} classes a site, the data has {len(present)}; "
            "use a smaller number"
        )
    if (dealt := len(parts) * per_site) < len(present):
        log.warning(
            "%s over %d sites leaves out %d of %d classes; use more sites to use them all",
            spec,
            len(parts),
            len(present) - dealt,
            len(present),
        )
    turn = rng.permutation(present)
    kept = []
    for i, part in enumerate(parts):
        own = turn[np.arange(i * per_site, (i + 1) * per_site) % len(turn)]
        chosen = part[np.isin(labels[part], own)]
        fault = _fault(chosen, number, min_samples)
        if (lacking := len(np.setdiff1d(own, labels[chosen]))) > 0:
            fault = f"no sample of {lacking} of its {per_site} classes"
        if fault is not None:
            raise ConfigError(
                f"partition={spec} over {len(parts)} sites leaves site {i} {fault}; "
                "use fewer sites or more groups"
            )
        kept.append(chosen)
    return kept


def _fault(chosen: Index, number: NDArray[np.integer], min_samples: int) -> str | None:
    """What makes a site's samples too few, None if nothing does."""
    if len(chosen) < min_samples:
        return f"{len(chosen)} samples, fewer than {min_samples}"
    groups = len(np.unique(number[chosen]))
    return None if groups >= _GROUPS_A_SITE else f"samples of {groups} group, which cannot be split"
