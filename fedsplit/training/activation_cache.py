"""What came back from the encoder, kept at the site by sample: a second look at a sample costs no traffic.

Only for frozen heads, whose activations are the same each time. pipeline.py asks it for what is missing of
a batch and sends that alone. Rows of masked texts are kept at their own length, so it does not matter how
far a batch was padded. Shapes: B batch, T tokens, D width, P pooled width.

How equal: a batch of which nothing is known goes out as it is, and its rows come back bit for bit. A row that
was computed among other samples, or with other padding, may differ in the last bits of a float, because
matrix products round by their shapes; images grouped alike are bit-equal.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsplit.core.cut import Cut
from fedsplit.training.data import Batch
from fedsplit.training.row_cache import RowCache

Row = NDArray[np.float32]
CACHE_BYTES = 256 * 2**20
# Runs whose activations are kept at a time.
MAX_RUNS = 2


class _Place(NamedTuple):
    run: Hashable
    source: Hashable
    cut: Cut
    version: str


class ActivationCache:
    """Rows of samples, up to `max_bytes` over all its places; see RowCache. Safe to use from several threads."""

    def __init__(self, *, max_bytes: int = CACHE_BYTES) -> None:
        self.rows = RowCache(max_bytes)
        self._rounds: dict[_Place, int] = {}
        self._lock = threading.Lock()
        self.hits = self.misses = 0
        """Rows asked for that were there, and that were not."""

    def at(
        self, cut: Cut, version: str, *, source: Hashable = "", run: Hashable = "", round_: int = 0
    ) -> CacheView:
        """The rows of one cut and one version of all that lies below the tail.

        `source`: what the samples' numbers belong to, and what prepares them. A version that has not been used in the
        round before is over, as are the runs before the last.
        """
        place = _Place(run, source, cut, version)
        with self._lock:
            if place not in self._rounds:
                self._drop_old(place, round_)
            self._rounds[place] = round_
        self.rows.use(place)
        return CacheView(self, place)

    def _drop_old(self, new: _Place, round_: int) -> None:
        places = dict(self._rounds)
        runs = list(dict.fromkeys([p.run for p in places if p.run != new.run]))
        over = [
            p
            for p, last in places.items()
            if p.run in runs[: len(runs) + 1 - MAX_RUNS]
            or ((p.run, p.source) == (new.run, new.source) and last < round_ - 1)
        ]
        for place in over:
            self._rounds.pop(place, None)
        self.rows.drop(over)


@dataclass(frozen=True)
class Lookup:
    """A batch, the rows of it that are known, and the rest as a batch of its own."""

    batch: Batch
    known: tuple[Row | None, ...]
    missing: Batch | None
    """None: nothing is missing. The batch itself: everything is."""


class CacheView:
    """The cache as one cut at one version sees it. Made by `ActivationCache.at`."""

    def __init__(self, cache: ActivationCache, place: _Place) -> None:
        self._cache = cache
        self._place = place
        self.hits = self.misses = 0
        """As the cache's, of this view alone."""

    def look_up(self, batch: Batch) -> Lookup:
        """What is known of a batch, and the sub-batch to ask the encoder for."""
        known = tuple(self._cache.rows.find(self._place, [int(key) for key in batch.keys]))
        missing = [i for i, row in enumerate(known) if row is None]
        for counts in (self, self._cache):
            counts.misses += len(missing)
            counts.hits += len(known) - len(missing)
        if not missing:
            return Lookup(batch, known, None)
        return Lookup(batch, known, batch if len(missing) == len(known) else part(batch, missing))

    def complete(self, found: Lookup, z: Tensor | None) -> Tensor:
        """The whole batch's activations, from what was known and from `z`, those that were missing."""
        if found.missing is None or z is None:
            return self._join(found, iter(()))
        fresh = _rows_of(z, found.missing)
        self._cache.rows.keep(self._place, [int(key) for key in found.missing.keys], fresh)
        return z if found.missing is found.batch else self._join(found, iter(fresh))

    def _join(self, found: Lookup, fresh: Iterator[Row]) -> Tensor:
        rows = [row if row is not None else next(fresh) for row in found.known]
        if rows[0].ndim == 1:
            return torch.from_numpy(np.stack(rows))
        tokens = len(rows[0])
        if (mask_BT := found.batch.mask) is not None:
            # A prompt's tokens are in the rows and not in the mask.
            tokens += mask_BT.shape[1] - int(mask_BT[0].sum())
        z_BTD = np.zeros((len(rows), tokens, rows[0].shape[1]), dtype=np.float32)
        for i, row in enumerate(rows):
            z_BTD[i, : len(row)] = row
        return torch.from_numpy(z_BTD)


def part(batch: Batch, positions: list[int]) -> Batch:
    """Some samples of a batch; texts, padded on the right, are so no further than to the longest of them."""
    inputs = {name: value[positions] for name, value in batch.inputs.items()}
    labels, keys = batch.labels[positions], batch.keys[positions]
    if batch.mask is None:
        return Batch(inputs, labels, None, keys)
    mask_BT = batch.mask[positions]
    longest = int(mask_BT.sum(dim=1).max())
    mask_BT = mask_BT[:, :longest]
    inputs = {name: value[:, :longest] for name, value in inputs.items()}
    return Batch(inputs, labels, None if bool(mask_BT.all()) else mask_BT, keys)


def _rows_of(z: Tensor, batch: Batch) -> list[Row]:
    values = z.detach().cpu().numpy()
    if values.ndim == 2 or batch.mask is None:
        return [np.array(row) for row in values]
    prompt = values.shape[1] - batch.mask.shape[1]
    lengths = (batch.mask.sum(dim=1) + prompt).tolist()
    return [np.array(row[:length]) for row, length in zip(values, lengths, strict=True)]


def version_of(tensors: Mapping[str, NDArray[np.float32]]) -> str:
    """Digest of module tensors: give it those on blocks[0:b], which are what activations depend on."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name}{tensors[name].shape}".encode())
        digest.update(np.ascontiguousarray(tensors[name], dtype=np.float32).tobytes())
    return digest.hexdigest()
