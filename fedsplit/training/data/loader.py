"""Examples -> batches, in an order that only the seed decides.

No worker processes: they would cost a device more memory than they save time. What repeats each epoch,
decoding, resizing, tokenising, is kept by `CachedTransform`, the same object over all epochs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray

from fedsplit.core.errors import ConfigError
from fedsplit.training.data.examples import Examples
from fedsplit.training.data.transform import Batch, Prepared, Transform, collate
from fedsplit.training.row_cache import RowCache

CACHE_BYTES = 256 * 2**20


def batches(
    examples: Examples,
    indices: Sequence[int] | NDArray[np.integer],
    transform: Transform,
    *,
    batch_size: int,
    seed: int | None = None,
) -> Iterator[Batch]:
    """The samples at `indices` once, the last batch maybe smaller.

    Shuffled by `seed`, alike on every machine; in the given order when it is None. Give each epoch its own.
    """
    if batch_size < 1:
        raise ConfigError(f"batch-size={batch_size} must be at least 1")
    order = np.asarray(indices, dtype=np.int64)
    if seed is not None:
        order = np.random.default_rng(seed).permutation(order)
    return (
        transform.collate(examples, order[start : start + batch_size].tolist())
        for start in range(0, len(order), batch_size)
    )


class CachedTransform:
    """A transform that keeps what it prepared, up to `cache_bytes`; then the rest is prepared each time.

    What was prepared of a source goes with it, or when another one wants the room. Texts and images come out equal to
    the bare transform's. Safe to use from several threads.
    """

    def __init__(self, transform: Transform, *, cache_bytes: int = CACHE_BYTES) -> None:
        self.inner = transform
        self.rows = RowCache(cache_bytes, places=WeakKeyDictionary())

    def prepare(self, examples: Examples, indices: Sequence[int]) -> list[Prepared]:
        """As the inner transform, from memory where possible."""
        keys = [int(examples.keys[i]) for i in indices]
        found = self.rows.find(examples.items, keys)
        missing = [at for at, value in enumerate(found) if value is None]
        fresh = self.inner.prepare(examples, [indices[at] for at in missing])
        for at, value in zip(missing, fresh, strict=True):
            found[at] = value
        self.rows.keep(examples.items, [keys[at] for at in missing], fresh)
        return [value for value in found if value is not None]

    def assemble(self, prepared: Sequence[Prepared]) -> tuple[dict[str, torch.Tensor], Any]:
        """As the inner transform."""
        return self.inner.assemble(prepared)

    def collate(self, examples: Examples, indices: Sequence[int]) -> Batch:
        """A batch of the samples at `indices`."""
        return collate(self, examples, indices)
