"""Simulation only: deal one data set to the sites, with flwr-datasets' partitioners over its labels.

Deployed sites have their own data and never come here. Samples that belong together (groups) are dealt by
grouped.py. flwr-datasets loads for seconds, so inside calls.
"""

from __future__ import annotations

import logging
import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedsplit.core.config import PARTITIONS
from fedsplit.core.errors import ConfigError
from fedsplit.core.extras import extra
from fedsplit.training.data.examples import Index
from fedsplit.training.data.grouped import deal_groups

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)

MIN_SAMPLES = 4
"""No site gets fewer: it must train and test on them."""

_DRAWS = 50
_DEALING = "dealing one data set to simulated sites"


@dataclass(frozen=True)
class Partition:
    """How to deal: `value` is alpha (dirichlet, quantity) or the classes a site (pathological)."""

    kind: Literal["iid", "dirichlet", "pathological", "quantity"]
    value: float = 0.0

    def __str__(self) -> str:
        return self.kind if self.kind == "iid" else f"{self.kind}:{self.value:g}"


def parse_partition(text: str) -> Partition:
    """Read `iid`, `dirichlet:ALPHA`, `pathological:CLASSES` or `quantity:ALPHA`. Raises ConfigError."""
    name, _, argument = text.partition(":")
    if text == "iid":
        return Partition("iid")
    try:
        value = float(argument)
    except ValueError:
        value = math.nan
    good = math.isfinite(value) and value > 0
    if name == "dirichlet" and good:
        return Partition("dirichlet", value)
    if name == "quantity" and good:
        return Partition("quantity", value)
    if name == "pathological" and good and value.is_integer():
        return Partition("pathological", value)
    raise ConfigError(f"partition={text!r} is not known; use {PARTITIONS}")


def partition(
    labels: NDArray[np.integer],
    spec: str | Partition,
    sites: int,
    seed: int,
    groups: NDArray[np.integer] | None = None,
    *,
    min_samples: int = MIN_SAMPLES,
) -> list[Index]:
    """Sorted positions for each site, disjoint and together all, the same for the same seed.

    dirichlet: each class's shares of the sites are drawn from Dirichlet(alpha) (Yurochkin et al.,
    arXiv 1905.12022). pathological: each site has exactly that many classes (Li et al., arXiv 2102.02079);
    classes that find no site are left out, with a warning in the log. quantity: sizes are drawn from
    Dirichlet(alpha), the mix of classes is the same. With `groups` [N] whole groups are dealt, and for
    dirichlet and pathological some samples stay out: see grouped.py. Raises ConfigError where it cannot be done.
    """
    parsed = parse_partition(spec) if isinstance(spec, str) else spec
    if sites < 1:
        raise ConfigError(f"sites={sites} must be at least 1")
    if len(labels) < sites * min_samples:
        raise ConfigError(
            f"{len(labels)} samples are too few for {sites} sites with at least {min_samples} each; "
            "use fewer sites or more samples"
        )
    rng = np.random.default_rng(seed)
    if groups is not None:
        return deal_groups(labels, groups, parsed, sites, rng, min_samples=min_samples)
    deal = {
        "iid": _iid,
        "dirichlet": _dirichlet,
        "pathological": _pathological,
        "quantity": _quantity,
    }[parsed.kind]
    parts = deal(labels.astype(np.int64), parsed.value, sites, rng, min_samples)
    smallest = min(len(part) for part in parts)
    if smallest < min_samples:
        raise ConfigError(
            f"partition={parsed} over {sites} sites leaves a site {smallest} of {len(labels)} samples, "
            f"fewer than {min_samples}; use fewer sites or more samples"
        )
    return [np.sort(part) for part in parts]


def _iid(labels: Index, _: float, sites: int, rng: np.random.Generator, _min: int) -> list[Index]:
    # As IidPartitioner deals, which has no indices to read: see `_run`.
    with extra("simulation", _DEALING):
        from flwr_datasets.partitioner import SizePartitioner

    each, more = divmod(len(labels), sites)
    sizes = [each + (i < more) for i in range(sites)]
    return _run(SizePartitioner(sizes), _table(labels, rng))


def _quantity(
    labels: Index, alpha: float, sites: int, rng: np.random.Generator, min_samples: int
) -> list[Index]:
    with extra("simulation", _DEALING):
        from flwr_datasets.partitioner import SizePartitioner

    free = len(labels) - sites * min_samples
    ends = np.rint(np.cumsum(rng.dirichlet(np.full(sites, alpha))) * free).astype(np.int64)
    ends[-1] = free
    sizes = np.diff(ends, prepend=0) + min_samples
    return _run(SizePartitioner([int(size) for size in sizes]), _table(labels, rng))


def _dirichlet(
    labels: Index, alpha: float, sites: int, rng: np.random.Generator, min_samples: int
) -> list[Index]:
    with extra("simulation", _DEALING):
        from flwr_datasets.partitioner import DirichletPartitioner

    table = _table(labels, rng)
    for _ in range(_DRAWS):
        dealer = DirichletPartitioner(
            num_partitions=sites,
            partition_by="label",
            alpha=alpha,
            min_partition_size=min_samples,
            seed=int(rng.integers(2**32)),
        )
        try:
            return _run(dealer, table)
        except ValueError:
            continue  # it gave up after eleven draws
    raise ConfigError(
        f"partition=dirichlet:{alpha:g} leaves one of {sites} sites with fewer than {min_samples} of "
        f"{len(labels)} samples in every draw; use a larger ALPHA, fewer sites or more samples"
    )


def _pathological(
    labels: Index, value: float, sites: int, rng: np.random.Generator, _min: int
) -> list[Index]:
    """Deal hands of one class each, as many as sites x classes, and give every site neighbouring hands.

    The partitioner's own ways to assign classes leave some out even where all would fit.
    """
    with extra("simulation", _DEALING):
        from flwr_datasets.partitioner import PathologicalPartitioner

    per_site = int(value)
    present = np.unique(labels)
    if per_site > len(present):
        raise ConfigError(
            f"partition=pathological:{per_site} wants {per_site} classes a site, the data has "
            f"{len(present)}; use a smaller number"
        )
    hands = sites * per_site
    if hands < len(present):
        log.warning(
            "pathological:%d over %d sites leaves out %d of %d classes; use more sites to use them all",
            per_site,
            sites,
            len(present) - hands,
            len(present),
        )
    shuffled = np.empty(int(present[-1]) + 1, dtype=np.int64)
    shuffled[present] = rng.permutation(len(present))
    table = _table(shuffled[labels], rng)
    dealer = PathologicalPartitioner(
        num_partitions=hands,
        partition_by="label",
        num_classes_per_partition=1,
        class_assignment_mode="first-deterministic",
        seed=int(rng.integers(2**32)),
    )
    try:
        parts = _run(dealer, table)
    except ValueError as err:
        raise ConfigError(
            f"partition=pathological:{per_site} over {sites} sites needs more samples of a class than "
            f"there are ({err}); use fewer sites or more samples"
        ) from err
    return [np.concatenate(parts[i : i + per_site]) for i in range(0, hands, per_site)]


def _table(labels: Index, rng: np.random.Generator) -> Dataset:
    """A data set of shuffled positions and their labels; not one sample is copied."""
    with extra("simulation", _DEALING):
        import datasets

    order = rng.permutation(len(labels))
    return datasets.Dataset.from_dict({"index": order, "label": labels[order]})


def _run(dealer: Any, table: Dataset) -> list[Index]:
    dealer.dataset = table
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of every draw that it repeats
        count = dealer.num_partitions
        dealer.load_partition(0)  # some deal only now
    # load_partition makes a Dataset, about 2 ms each: seconds for 1,000 sites. The indices are all we want.
    dealt = dealer._partition_id_to_indices
    order = np.asarray(table["index"][:], dtype=np.int64)
    return [order[np.asarray(dealt[i], dtype=np.int64)] for i in range(count)]
