"""What frozen blocks answered, kept a sample: by their input, so that batches, rounds, seeds and runs share the work.

`MemoEncoder` remembers a frozen session's answers; `BehindMemo` is a session that changes, behind
blocks that don't: those in front of the first one with module tensors answer from the memo.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict

import numpy as np

from fedsplit.core.encoder import Array, Encoder, Mask, Want

MEMO_BYTES = 1 << 30


class Memo:
    """Answers of frozen encoders, a sample each, up to `max_bytes`; the one unused longest goes first. Thread-safe."""

    def __init__(self, max_bytes: int = MEMO_BYTES) -> None:
        self._room = max_bytes
        self._kept: OrderedDict[bytes, Array] = OrderedDict()
        self._lock = threading.Lock()
        self.hits = self.misses = 0

    def find(self, keys: list[bytes]) -> list[Array | None]:
        """What is known, in the keys' order."""
        with self._lock:
            found = [self._kept.get(key) for key in keys]
            for key, value in zip(keys, found, strict=True):
                if value is not None:
                    self._kept.move_to_end(key)
            self.hits += sum(value is not None for value in found)
            self.misses += sum(value is None for value in found)
        return found

    def keep(self, key: bytes, value: Array) -> None:
        """Remember one sample's answer."""
        with self._lock:
            if key in self._kept or value.nbytes > self._room:
                while key not in self._kept and self._kept and value.nbytes > self._room:
                    self._room += self._kept.popitem(last=False)[1].nbytes
                if key in self._kept or value.nbytes > self._room:
                    return
            self._kept[key] = value
            self._room -= value.nbytes


class MemoEncoder:
    """A core.encoder.Encoder whose `encode` for the output alone runs the samples alone that the memo does not know."""

    def __init__(self, inner: Encoder, memo: Memo, key: bytes) -> None:
        """`key`: what all of the session's samples have in common, the blocks and their weights."""
        self._inner, self._memo, self._key = inner, memo, key
        self.trains = inner.trains
        self.settle, self.close = inner.settle, inner.close

    def encode(
        self, step: int, h_BTD: Array, mask_BT: Mask | None = None, *, want: Want = "output"
    ) -> Array:
        """See core.encoder.Encoder."""
        if want != "output":
            return self._inner.encode(step, h_BTD, mask_BT, want=want)
        keys = _keys(self._key, h_BTD, mask_BT)
        found = self._memo.find(keys)
        new = [i for i, value in enumerate(found) if value is None]
        if new:
            mask = None if mask_BT is None else mask_BT[new]
            z = self._inner.encode(step, h_BTD[new], mask)
            for at, row in zip(new, z, strict=True):
                # A copy: a row of the batch would keep the whole batch in memory.
                found[at] = row = row.copy()
                self._memo.keep(keys[at], row)
        return np.stack([row for row in found if row is not None])


class BehindMemo:
    """A core.encoder.Encoder on blocks[b:c], behind the frozen blocks[a:b] of `ahead`: together a session on blocks[a:c]."""

    def __init__(self, ahead: MemoEncoder, inner: Encoder) -> None:
        self._ahead, self._inner = ahead, inner
        self.trains = inner.trains
        self._held: dict[int, tuple[Array, Mask | None]] = {}

    def encode(
        self, step: int, h_BTD: Array, mask_BT: Mask | None = None, *, want: Want = "output"
    ) -> Array:
        """See core.encoder.Encoder."""
        middle = self._ahead.encode(step, h_BTD, mask_BT)
        z = self._inner.encode(step, middle, mask_BT, want=want)
        if want == "gradient":
            self._held[step] = (h_BTD, mask_BT)
        return z

    def settle(self, step: int, answer: Array, *, quiet: bool = False) -> Array | None:
        """See core.encoder.Encoder. Only here the frozen blocks' graph is wanted, so it is made now."""
        d_middle = self._inner.settle(step, answer, quiet=quiet)
        held = self._held.pop(step, None)
        if d_middle is None or held is None:
            return None
        self._ahead.encode(step, *held, want="gradient")
        return self._ahead.settle(step, d_middle)

    def close(self) -> None:
        """See core.encoder.Encoder."""
        self._held.clear()
        self._ahead.close()
        self._inner.close()


def _keys(prefix: bytes, h_BTD: Array, mask_BT: Mask | None) -> list[bytes]:
    start = hashlib.blake2b(prefix, digest_size=16)
    start.update(repr(h_BTD.shape[1:]).encode())
    keys = []
    for i, row in enumerate(np.ascontiguousarray(h_BTD)):
        digest = start.copy()
        digest.update(row.data)
        # All-true and no mask are the same to the blocks.
        if mask_BT is not None and not mask_BT[i].all():
            digest.update(np.packbits(mask_BT[i]).tobytes())
        keys.append(digest.digest())
    return keys
